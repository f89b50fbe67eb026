"""Does this machine keep the promise on which bit-exactness rests, with this model's widths? Asked at start-up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.nn import functional

from coserve_engine.attention import Mask
from coserve_engine.functional import rms_norm
from coserve_engine.linears import PROBED_ROWS, PackedLinear, differing_rows
from coserve_engine.transformer import Transformer

Rowwise = Callable[[torch.Tensor], torch.Tensor]
RANK = 8


def probe_row_invariance(transformer: Transformer, *, backward: bool) -> tuple[str, ...]:
    """Names of operations whose rows have other bits in a small batch than in a larger one.

    Empty means that the engine's bit-exactness holds here; anything else is a line for the log, since BLAS kernels
    differ between processors, and widths that are no multiple of 8 leave scalar tails.

    Args:
        backward: whether finetuning's products matter too.
    """
    generator, like = torch.Generator().manual_seed(0), transformer.weights.embed

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(like.device, like.dtype)

    def differs(width: int, operation: Rowwise) -> bool:
        return bool(differing_rows(operation, draw(PROBED_ROWS[-1], width), transformer.numerics))

    operations = (*_products(transformer, draw, backward=backward), *_rowwise(transformer))
    odd = tuple(name for name, width, operation in operations if differs(width, operation))
    return (*odd, "attention") if _attention_differs(transformer, draw) else odd


def _products(
    transformer: Transformer, draw: Callable[..., torch.Tensor], *, backward: bool
) -> Iterator[tuple[str, int, Rowwise]]:
    """Name, width of a row, and every kind of product of a layer: frozen weights and LoRA's of each shape, but for
    packed weights, which are chosen only where the same was asked of them.
    """
    tried: set[tuple[int, int]] = set()
    for name, weight in transformer.weights.layers[0].linears.items():
        out, into = shape = transformer.config.linear_shape(name)
        if shape in tried:
            continue
        tried.add(shape)
        (a, b), (x, y) = (draw(RANK, into), draw(out, RANK)), (draw(into), draw(out))
        down, up = a.t().contiguous(), b.t().contiguous()
        if not isinstance(weight, PackedLinear):
            yield name, into, weight.forward
            if backward:
                yield f"{name} backward", out, weight.backward
        yield f"{name} A", into, partial(torch.mm, mat2=down)
        yield f"{name} B", RANK, partial(_added, y, up)
        if backward:
            yield f"{name} A backward", RANK, partial(_added, x, a)
            yield f"{name} B backward", out, partial(torch.matmul, other=b)


def _added(row: torch.Tensor, weight: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """low [R, rank] weight [rank, N] added to R times `row` [N]."""
    return row.expand(low.shape[0], -1).clone().addmm_(low, weight)


def _rowwise(transformer: Transformer) -> Iterator[tuple[str, int, Rowwise]]:
    """What a layer does to each row alone, where a vector's tail may be computed otherwise."""
    config, norm = transformer.config, transformer.weights.norm
    yield "norm", config.hidden, lambda x: rms_norm(x, norm, config.rms_eps)[0]
    yield "silu", config.intermediate, functional.silu
    yield "silu backward", config.intermediate, lambda x: torch.ops.aten.silu_backward(x, x)


def _attention_differs(transformer: Transformer, draw: Callable[..., torch.Tensor]) -> bool:
    """Rows of a tile, one and some, against the whole tile."""
    config, numerics, attention = transformer.config, transformer.numerics, transformer.attention
    tile, keys = numerics.tile, 5 * numerics.tile
    q = draw(tile, config.heads, config.head_size)
    k, v = (draw(config.kv_heads, keys, config.head_size) for _ in range(2))
    mask = Mask.create(numerics, config.heads // config.kv_heads, keys, None, q.dtype, q.device)
    whole, _ = attention.attend(q, k, v, mask, 0)
    for at in (0, tile // 3, tile - 1):
        one = attention.attend_singles(q[at : at + 1].clone(), [(k[None], v[None])], mask, (at,))
        some, _ = attention.attend(q[at : at + 5].clone(), k, v, mask, at)
        if not (torch.equal(one[0], whole[at]) and torch.equal(some, whole[at : at + 5])):
            return True
    return False
