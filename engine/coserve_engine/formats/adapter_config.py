"""adapter_config.json: a PEFT adapter is served as PEFT computes it, or refused with the field that stands against it.

What is adapted is read from the tensors' names, so the fields that chose it in training are not looked at. A field that
nobody here knows may change the mathematics: it must be empty.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from coserve_engine.errors import AdapterFolderError
from coserve_engine.formats.model_fields import is_finite_number
from coserve_engine.formats.opened import read_text
from coserve_engine.formats.patterns import PatternError, matches, parsed

ADAPTER_CONFIG = "adapter_config.json"
Number = TypeVar("Number", int, float)

COMPUTED = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "bias")
CHOSEN_BY = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
"""What chose the adapted modules."""
NOTES = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
)
"""What says how training went, or has a meaning only beside a field that is refused."""

MERGE = "merge it into the model with PEFT's merge_and_unload() and serve that folder, or train without it"
TRAIN = "train without it"
REFUSED: Mapping[str, str] = {
    "alora_invocation_tokens": TRAIN,
    "arrow_config": TRAIN,
    "fan_in_fan_out": "this model's linears are not stored turned; set it to false",
    "kasa_config": MERGE,
    "layer_replication": MERGE,
    "lora_bias": MERGE,
    "megatron_config": TRAIN,
    "modules_to_save": MERGE,
    "monteclora_config": TRAIN,
    "target_parameters": MERGE,
    "trainable_token_indices": MERGE,
    "use_bdlora": MERGE,
    "use_dora": MERGE,
    "use_qalora": TRAIN,
    "velora_config": MERGE,
}
"""Field that changes the mathematics unless it is empty -> remedy."""
VARIANTS = ("arrow_config", "kasa_config", "monteclora_config", "use_bdlora", "velora_config")
"""Of these, {} asks for the variant with its defaults."""

PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights that leave the base model as it is; true and false do too."""


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """How an adapter's products are scaled; module names are PEFT's, without its `base_model.model.`."""

    path: Path
    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    def rank_of(self, module: str) -> int:
        """Rows of A."""
        return _by_pattern(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """What its scale is made of, by the rank or its root."""
        return _by_pattern(self.alpha_pattern, module, self.alpha)

    def scale_of(self, module: str) -> float:
        """What (x A^T) B^T is multiplied by."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.use_rslora else rank)


def _by_pattern(patterns: Mapping[str, Number], module: str, default: Number) -> Number:
    """The value of the first pattern that matches, as PEFT's get_pattern_key looks for it."""
    return next((value for key, value in patterns.items() if matches(_whole(key), module)), default)


def _whole(key: str) -> str:
    return rf"(.*\.)?({key})$"


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Parse adapter_config.json.

    Raises:
        AdapterFolderError: the file is missing or broken, or the adapter is not plain LoRA.
    """
    path = folder / ADAPTER_CONFIG
    try:
        raw: Any = json.loads(read_text(folder, ADAPTER_CONFIG))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFolderError(f"{path}: not readable as a PEFT adapter's configuration ({error})") from None
    if not isinstance(raw, dict):
        raise AdapterFolderError(f"{path}: holds a {type(raw).__name__}, not a PEFT adapter's configuration")
    for field in ("peft_type", "r", "lora_alpha"):
        if field not in raw:
            raise AdapterFolderError(
                f"{path}: field {field!r} is missing; save the adapter with PEFT's save_pretrained"
            )
    _refuse_other_mathematics(path, raw)
    return AdapterConfig(
        path,
        _rank(path, "r", raw["r"]),
        _alpha(path, "lora_alpha", raw["lora_alpha"]),
        bool(raw.get("use_rslora")),
        {key: _rank(path, f"rank_pattern[{key!r}]", value) for key, value in _patterns(path, raw, "rank_pattern")},
        {key: _alpha(path, f"alpha_pattern[{key!r}]", value) for key, value in _patterns(path, raw, "alpha_pattern")},
    )


def _refuse_other_mathematics(path: Path, raw: Mapping[str, Any]) -> None:
    def refuse(field: str, remedy: str) -> None:
        raise AdapterFolderError(f"{path}: {field} is {raw[field]!r}, which is not supported; {remedy}")

    if raw["peft_type"] != "LORA":
        refuse("peft_type", f"only 'LORA' is: {MERGE}")
    if raw.get("bias") not in (None, "none"):
        refuse("bias", f"only 'none' is: {MERGE}")
    if not isinstance(raw.get("use_rslora"), bool | None):
        refuse("use_rslora", "it must be true or false")
    start = raw.get("init_lora_weights")
    if not isinstance(start, bool | None) and str(start).lower() not in PLAIN_STARTS:
        refuse(
            "init_lora_weights",
            "it may have changed the base model: save the adapter with save_pretrained's "
            "path_initial_model_for_weight_conversion, or merge it into the model with PEFT's merge_and_unload()",
        )
    for field, value in raw.items():
        known = field in COMPUTED or field in CHOSEN_BY or field in NOTES
        if not known and (value or (field in VARIANTS and value == {})):
            refuse(field, REFUSED.get(field, "remove the field if the adapter is plain LoRA without it"))


def _patterns(path: Path, raw: Mapping[str, Any], field: str) -> list[tuple[str, object]]:
    patterns = raw.get(field)
    if patterns is None:
        return []
    if not isinstance(patterns, dict):
        raise AdapterFolderError(f"{path}: {field} is {patterns!r}; it must map patterns of module names to numbers")
    for pattern in patterns:
        try:
            parsed(_whole(pattern))
        except PatternError as error:
            raise AdapterFolderError(
                f"{path}: {field} has {pattern!r}, which is no regular expression that is understood ({error})"
            ) from None
    return list(patterns.items())


def _rank(path: Path, field: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise AdapterFolderError(f"{path}: {field} is {value!r}; it must be a whole number of at least 1")
    return value


def _alpha(path: Path, field: str, value: object) -> float:
    if not is_finite_number(value):
        raise AdapterFolderError(f"{path}: {field} is {value!r}; it must be a finite number")
    return float(value)  # type: ignore[arg-type]
