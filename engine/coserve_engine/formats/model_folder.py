"""What a model folder's config.json says, read as transformers reads it, and refused where it asks for more than we do.

Architectures differ in data only: which linears have biases, whether queries and keys are normalised, how far each
layer sees, and what a field means that is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from coserve_engine.config import LINEARS, ModelConfig
from coserve_engine.errors import ModelFolderError
from coserve_engine.formats.model_fields import Fields
from coserve_engine.formats.rope_fields import read_rope

QKV = ("q_proj", "k_proj", "v_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
FULL, SLIDING = "full_attention", "sliding_attention"

Windows = tuple[int | None, ...]


def _no_window(config: Fields, layers: int) -> Windows:
    config.only("sliding_window", None)
    return _checked_types(config, (None,) * layers)


def _one_window(config: Fields, layers: int) -> Windows:
    return _checked_types(config, (config.optional_count("sliding_window"),) * layers)


def _checked_types(config: Fields, windows: Windows) -> Windows:
    """`windows`, where layer_types does not contradict them."""
    types = [FULL if window is None else SLIDING for window in windows]
    if config.raw.get("layer_types") not in (None, types):
        config.refuse("layer_types", f"this architecture has {types[0]} in all {len(types)} layers")
    return windows


def _windows_by_layer(config: Fields, layers: int) -> Windows:
    window = config.optional_count("sliding_window") if config.flag("use_sliding_window") else None
    types = config.raw.get("layer_types")
    if types is None:
        first = layers if window is None else config.count("max_window_layers", least=0)
        return tuple(window if index >= first else None for index in range(layers))
    known = (FULL,) if window is None else (FULL, SLIDING)
    if not isinstance(types, list) or len(types) != layers or any(kind not in known for kind in types):
        config.refuse(
            "layer_types",
            f"it must be a list of {layers} among {known}; {SLIDING!r} also needs use_sliding_window and "
            "sliding_window",
        )
    return tuple(window if kind == SLIDING else None for kind in types)


@dataclass(frozen=True, slots=True)
class _Architecture:
    """How to read one architecture's config.json.

    Args:
        model_type: its name there.
        windows: the windows of so many layers.
        biased: linears that always have a bias; bias_fields: those that have one where the field is true.
        defaults: what fields mean that are left out.
    """

    model_type: str
    windows: Callable[[Fields, int], Windows]
    biased: tuple[str, ...] = ()
    bias_fields: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    qk_norm: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


_COMMON: Mapping[str, Any] = {
    "head_dim": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_QWEN: Mapping[str, Any] = {
    **_COMMON,
    "num_key_value_heads": 32,
    "eos_token_id": None,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_ARCHITECTURES: Mapping[str, _Architecture] = {
    "LlamaForCausalLM": _Architecture(
        "llama",
        _no_window,
        bias_fields={"attention_bias": (*QKV, "o_proj"), "mlp_bias": MLP},
        defaults={**_COMMON, "num_key_value_heads": None, "eos_token_id": 2},
    ),
    "MistralForCausalLM": _Architecture(
        "mistral",
        _one_window,
        defaults={**_COMMON, "num_key_value_heads": 8, "eos_token_id": 2, "sliding_window": 4096},
    ),
    "Qwen2ForCausalLM": _Architecture("qwen2", _windows_by_layer, biased=QKV, defaults=_QWEN),
    "Qwen3ForCausalLM": _Architecture(
        "qwen3",
        _windows_by_layer,
        bias_fields={"attention_bias": (*QKV, "o_proj")},
        qk_norm=True,
        defaults={**_QWEN, "head_dim": 128},
    ),
}


def read_model_config(folder: Path) -> ModelConfig:
    """Parse `folder`/config.json.

    Raises:
        ModelFolderError: the file is missing, not JSON, lacks a field, or asks for something that is not supported.
    """
    config = Fields.read(folder / "config.json")
    names = config.raw.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        supported = ", ".join(_ARCHITECTURES)
        raise ModelFolderError(f"{config.path}: architectures is {names!r}; one of {supported} is supported")
    architecture = _ARCHITECTURES[name]
    return _read(replace(config, defaults=architecture.defaults), architecture)


def _read(config: Fields, architecture: _Architecture) -> ModelConfig:
    config.only("model_type", architecture.model_type)
    config.only("hidden_act", "silu")
    if config.raw.get("quantization_config") is not None:
        config.refuse("quantization_config", "quantized weights are not supported; use the model's unquantized folder")
    hidden, heads, layers = (config.count(n) for n in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    kv_heads = config.optional_count("num_key_value_heads") or heads
    if heads % kv_heads:
        config.refuse("num_key_value_heads", f"num_attention_heads {heads} is no multiple of it")
    head_size = config.optional_count("head_dim") or hidden // heads
    if head_size < 2 or head_size % 2:
        raise ModelFolderError(f"{config.path}: head_dim is {head_size}; rotary embedding needs an even number")
    given = {n for key, linears in architecture.bias_fields.items() if config.flag(key) for n in linears}
    vocab_size, max_positions = config.count("vocab_size"), config.count("max_position_embeddings")
    return ModelConfig(
        vocab_size=vocab_size,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        intermediate=config.count("intermediate_size"),
        rms_eps=config.number("rms_norm_eps"),
        rope=read_rope(config, max_positions),
        max_positions=max_positions,
        biased=tuple(n for n in LINEARS if n in given or n in architecture.biased),
        qk_norm=architecture.qk_norm,
        windows=architecture.windows(config, layers),
        tied=config.flag("tie_word_embeddings"),
        eos_token_ids=_eos(config, vocab_size),
    )


def _eos(config: Fields, vocab_size: int) -> tuple[int, ...]:
    value = config.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
        config.refuse("eos_token_id", "it must be a token id, a list of them, or null")
    if any(not 0 <= token < vocab_size for token in ids):
        config.refuse(
            "eos_token_id",
            f"a token id must be from 0 to {vocab_size - 1} (vocab_size is {vocab_size}); copy config.json and weights "
            "from the same model, or set it to null",
        )
    return tuple(ids)


def check_length(folder: Path, model: ModelConfig, length: int) -> None:
    """Raises ModelFolderError where `model`, of `folder`, has no positions for so many tokens."""
    if length > model.max_positions:
        raise ModelFolderError(
            f"maxModelLength is {length}, but {folder / 'config.json'} allows max_position_embeddings "
            f"{model.max_positions}; lower maxModelLength"
        )
