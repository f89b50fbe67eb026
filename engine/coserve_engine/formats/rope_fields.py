"""How config.json describes rotary embedding, in transformers' present form (rope_parameters) and its older ones
(rope_theta beside rope_scaling).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from coserve_engine.config import LinearScaling, Llama3Scaling, Rope, YarnScaling
from coserve_engine.formats.model_fields import Fields

Scaling = LinearScaling | Llama3Scaling | YarnScaling | None
DEFAULT_THETA = 10000.0


def read_rope(config: Fields, max_positions: int) -> Rope:
    """The rotary embedding of a config.json.

    `max_positions`: the model's context, which stands for original_max_position_embeddings where that is left out.

    Raises:
        ModelFolderError: a kind that is not supported, or a field without a usable value.
    """
    name = "rope_scaling" if config.raw.get("rope_scaling") else "rope_parameters"
    raw = config.raw.get(name) or {}
    if not isinstance(raw, Mapping):
        config.refuse(name, "it must be an object")
    original = config.raw.get("original_max_position_embeddings", raw.get("original_max_position_embeddings"))
    values = dict(raw) if original is None else {**raw, "original_max_position_embeddings": original}
    defaults = {
        "rope_type": raw.get("type", "default"),
        "rope_theta": config.raw.get("rope_theta", DEFAULT_THETA),
        "original_max_position_embeddings": max_positions,
        "attention_factor": None,
        "mscale": None,
        "mscale_all_dim": None,
        "truncate": True,
    }
    rope = Fields(config.path, values, f"{name}.", defaults)
    for fields in (config, rope):
        fields.only("partial_rotary_factor", None, 1.0)
    for key, value in raw.items():
        if isinstance(value, Mapping):
            rope.refuse(key, "only one rotary embedding for all layers is supported")
    kind = rope.get("rope_type")
    if kind not in _SCALINGS:
        rope.refuse(
            "rope_type",
            f"only {', '.join(_SCALINGS)} are supported ('dynamic' and 'longrope' turn keys anew as a sequence grows)",
        )
    return Rope(rope.number("rope_theta"), _SCALINGS[kind](rope, max_positions))


def _default(rope: Fields, max_positions: int) -> Scaling:
    return None


def _linear(rope: Fields, max_positions: int) -> Scaling:
    return LinearScaling(rope.number("factor"))


def _llama3(rope: Fields, max_positions: int) -> Scaling:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        rope.refuse("high_freq_factor", f"it must be above low_freq_factor, which is {low!r}")
    return Llama3Scaling(rope.number("factor"), low, high, rope.count("original_max_position_embeddings"))


def _yarn(rope: Fields, max_positions: int) -> Scaling:
    original = rope.count("original_max_position_embeddings")
    factor = max_positions / original if rope.get("factor") is None else rope.number("factor")

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.get("attention_factor") is not None:
        attention = rope.number("attention_factor")
    elif rope.get("mscale") and rope.get("mscale_all_dim"):
        attention = scale(rope.number("mscale")) / scale(rope.number("mscale_all_dim"))
    else:
        attention = scale(1.0)
    fast = rope.number("beta_fast") if rope.raw.get("beta_fast") else 32.0
    slow = rope.number("beta_slow") if rope.raw.get("beta_slow") else 1.0
    return YarnScaling(factor, original, attention, fast, slow, rope.flag("truncate"))


_SCALINGS: Mapping[str, Callable[[Fields, int], Scaling]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
