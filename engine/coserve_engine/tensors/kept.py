"""What forward keeps of a pass for its backward, layer by layer, within a bound of bytes.

From the graph of a layer, with frozen weights, backward needs the inputs of its two halves, the queries (and keys,
where they are normalised) before norm and rotation, attention's output and log-sum-exp, and the MLP's two products;
norms, rotated queries and the inputs of adapters are cheap to rebuild and never kept (FlexLLM's graph pruning). Of
the rest a layer can drop more and compute it again: first what the MLP's two products gave, then all but its input
and attention's result. Not one bit of a gradient depends on the choice.
"""

from __future__ import annotations

import math

from coserve_engine.config import ModelConfig

Shapes = dict[str, tuple[int, ...]]
"""Name -> shape of one row."""


def levels(config: ModelConfig) -> tuple[Shapes, Shapes, Shapes]:
    """What a layer can keep, from everything to the least."""
    least: Shapes = {"x": (config.hidden,), "o": (config.heads, config.head_size), "lse": (config.heads,)}
    middle: Shapes = {**least, "x2": (config.hidden,), "q": (config.heads, config.head_size)}
    if config.qk_norm:
        middle["k"] = (config.kv_heads, config.head_size)
    return {**middle, "gate": (config.intermediate,), "up": (config.intermediate,)}, middle, least


def row_values(shapes: Shapes) -> int:
    """Values kept of one row of a layer."""
    return sum(map(math.prod, shapes.values()))


def plan_kept(config: ModelConfig, row_bytes: int, limit_bytes: int | None) -> tuple[Shapes, ...]:
    """Per layer, what is kept: as much as `limit_bytes` allow (None: everything), else the least.

    Args:
        row_bytes: bytes of one value times the rows of the pass.
    """
    steps = levels(config)
    chosen = [0] * config.layers
    for level in (1, 2):
        for layer in range(config.layers):
            total = row_bytes * sum(row_values(steps[at]) for at in chosen)
            if limit_bytes is None or total <= limit_bytes:
                break
            chosen[layer] = level
    return tuple(steps[at] for at in chosen)
