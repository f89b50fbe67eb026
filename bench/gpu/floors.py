"""What a token of finetuning and an iteration of decode take at least on a device with these rates, part by part."""

from __future__ import annotations

from machine import Rates

from coserve_engine.config import LINEARS, ModelConfig

ITEM = 2
"""Bytes of a value in bfloat16."""


def _linears(model: ModelConfig) -> int:
    """Weights of all layers' linears."""
    return model.layers * sum(out * into for out, into in map(model.linear_shape, LINEARS))


def finetune_us(model: ModelConfig, length: int, rank: int, rates: Rates) -> dict[str, float]:
    """Microseconds a token of samples of `length`, everything kept for backward.

    Products: forward and dx, with the head (4 operations a weight). Attention: 2 products forward, 5 backward, of half
    the length on average. LoRA: forward, dx, both gradients, and x A again (7 a weight). Element-wise: bytes of norms,
    rotation and gate, read and written, in both directions. Keep: each value copied.
    """
    heads, kv = model.heads * model.head_size, model.kv_heads * model.head_size
    lora = model.layers * rank * sum(sum(model.linear_shape(name)) for name in LINEARS)
    values = 18 * model.hidden + 4 * (heads + 2 * kv) + 11 * model.intermediate
    kept = 2 * model.hidden + 2 * heads + 2 * model.intermediate
    flops = {
        "products": 4 * _linears(model),
        "head": 4 * model.vocab_size * model.hidden,
        "attention": 14 * heads * (length / 2) * model.layers,
        "LoRA": 7 * lora,
    }
    read = {"element-wise": ITEM * values * model.layers, "keep": 2 * ITEM * kept * model.layers}
    return {
        **{part: 1e6 * count / rates.flops_per_s for part, count in flops.items()},
        **{part: 1e6 * count / rates.bytes_per_s for part, count in read.items()},
    }


def decode_ms(model: ModelConfig, rows: int, context: int, rates: Rates) -> float:
    """Milliseconds of an iteration: weights, head, keys and values read once, or the products' operations."""
    weights = _linears(model) + model.vocab_size * model.hidden
    cached = rows * context * 2 * model.layers * model.kv_heads * model.head_size
    return 1e3 * max(ITEM * (weights + cached) / rates.bytes_per_s, 2 * rows * weights / rates.flops_per_s)
