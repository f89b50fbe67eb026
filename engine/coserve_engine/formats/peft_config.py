"""adapter_config.json as PEFT's save_pretrained writes it: every field, since tools look for those, too, that plain
LoRA leaves at their defaults.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from coserve_engine.job_messages import LoraSpec

PEFT_VERSION = "0.21.2"
"""Whose fields these are. PEFT passes over fields that are newer than itself."""
_PLAIN: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": PEFT_VERSION,
    "qalora_group_size": 16,
    "rank_pattern": {},
    "revision": None,
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "velora_config": None,
}
"""What every adapter of ours has."""


def config_text(spec: LoraSpec, targets: Sequence[str], base_model_name: str) -> str:
    """The file's text. Loaders such as AutoPeftModelForCausalLM look for the base model at `base_model_name`."""
    config = _PLAIN | {
        "base_model_name_or_path": base_model_name,
        "lora_alpha": int(spec.alpha) if spec.alpha == int(spec.alpha) else spec.alpha,
        "lora_dropout": spec.dropout,
        "r": spec.rank,
        "target_modules": list(targets),
        "use_rslora": spec.use_rslora,
    }
    return json.dumps(config, indent=2, sort_keys=True)
