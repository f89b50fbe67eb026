"""Adapter folders that PEFT itself saved, and the logits that PEFT and an engine compute with them."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from engine_rig import Rig
from peft import LoraConfig, PeftModel
from peft_reference import wrap_in_peft
from transformers import AutoModelForCausalLM

from coserve_engine.config import LINEARS
from coserve_engine.formats.adapter_folder import read_adapter
from coserve_engine.scheduler.plan import Kind, Segment
from coserve_engine.tensors.lora import LoraWeights

TOLERANCE = 1e-4
"""float32 logits of a few units; what an adapter of random factors changes is above 1e-2."""
PLAIN_LORA: dict[str, Any] = {"r": 6, "lora_alpha": 12, "target_modules": list(LINEARS), "task_type": "CAUSAL_LM"}


def save_adapter(model: str, folder: Path, safe_serialization: bool = True, **settings: Any) -> Path:
    """save_pretrained of an adapter of PLAIN_LORA's settings but for those given, with random factors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of settings that are for other models
        made = wrap_in_peft(AutoModelForCausalLM.from_pretrained(model), LoraConfig(**{**PLAIN_LORA, **settings}))
        torch.manual_seed(3)
        with torch.no_grad():
            for name, value in made.named_parameters():
                if value.requires_grad or "lora_" in name:
                    value.add_(0.1 * torch.randn_like(value))
        made.save_pretrained(folder, safe_serialization=safe_serialization)
    return folder


def peft_logits(model: str, folder: Path, tokens: tuple[int, ...]) -> torch.Tensor:
    """[tokens, vocabulary]."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), folder)
        return loaded(torch.tensor([tokens])).logits[0]


def engine_logits(r: Rig, folder: Path, tokens: tuple[int, ...]) -> torch.Tensor:
    """[vocabulary], at the last position, with the adapter read from `folder` as LoadAdapter reads it."""
    e = r.executor
    weights = LoraWeights.served(read_adapter(folder, e.model, 64, e.dtype)).moved(e.copies.carry)
    slot = r.add(tokens)
    r.sequences[slot] = replace(r.sequences[slot], weights=weights)
    return r.forward(Segment(Kind.PREFILL, slot, 0, len(tokens), sample=True))[slot]
