"""Does this machine keep the promise on which bit-exactness rests, with this model's widths? Asked at start-up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.nn import functional

from coserve_engine.kernels.attention import Mask
from coserve_engine.kernels.cpu.linears import PROBED_ROWS, PackedLinear, differing_rows, probed_rows
from coserve_engine.kernels.cpu.table import CpuKernels
from coserve_engine.kernels.functional import rms_norm
from coserve_engine.model.executor import Executor
from coserve_engine.model.probe_units import ask_units
from coserve_engine.model.probe_words import Asked, ask_rows
from coserve_engine.model.transformer import Transformer
from coserve_engine.tensors.weights import FrozenLinear

Operation = tuple[str, tuple[int, int], Callable[[torch.Tensor], torch.Tensor]]
"""Name, (rows to try, width of a row), what is done to rows."""
RANK = 8


def differing_operations(executor: Executor) -> tuple[str, ...]:
    """Names of operations in which a row's bits depend on its batch, or a gradient's on how its pass was cut: of the
    operators of a CPU, of the words of another device.
    """
    backward = executor.config.finetuning
    if isinstance(executor.kernels, CpuKernels):
        return probe_row_invariance(executor.transformer, backward=backward)
    asked = Asked(executor)
    ask_rows(asked)
    if backward:
        ask_units(asked)
    return asked.odd


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

    kernels = transformer.kernels
    if not isinstance(kernels, CpuKernels):
        raise TypeError(f"only the CPU's kernels promise a row's bits, not {type(kernels).__name__}")
    operations = (*_products(transformer, draw, backward=backward), *_rowwise(transformer))
    numerics = kernels.numerics
    odd = tuple(name for name, shape, operation in operations if differing_rows(operation, draw(*shape), numerics))
    return (*odd, "attention") if _attention_differs(kernels, draw) else odd


def _products(transformer: Transformer, draw: Callable[..., torch.Tensor], *, backward: bool) -> Iterator[Operation]:
    """Every kind of product: frozen weights and LoRA's of each shape of a layer, and the head; but for packed weights,
    which are chosen only where the same was asked of them.
    """
    most, tried = PROBED_ROWS[-1], set[tuple[int, int]]()
    yield from _frozen("head", transformer.weights.head, transformer.weights.embed.shape, backward=backward)
    for name, weight in transformer.weights.layers[0].linears.items():
        out, into = shape = transformer.config.linear_shape(name)
        if shape in tried:
            continue
        tried.add(shape)
        yield from _frozen(name, weight, shape, backward=backward)
        (a, b), (x, y) = (draw(RANK, into), draw(out, RANK)), (draw(into), draw(out))
        down, up = a.t().contiguous(), b.t().contiguous()
        yield f"{name} A", (most, into), partial(torch.mm, mat2=down)
        yield f"{name} B", (most, RANK), partial(_added, y, up)
        if backward:
            yield f"{name} A backward", (most, RANK), partial(_added, x, a)
            yield f"{name} B backward", (most, out), partial(torch.matmul, other=b)


def _frozen(name: str, weight: FrozenLinear, shape: tuple[int, ...], *, backward: bool) -> Iterator[Operation]:
    out, into = shape
    if isinstance(weight, PackedLinear):
        return
    rows = probed_rows(out * into)
    yield name, (rows, into), weight.forward
    if backward:
        yield f"{name} backward", (rows, out), weight.backward


def _added(row: torch.Tensor, weight: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """low [R, rank] weight [rank, N] added to R times `row` [N]."""
    return row.expand(low.shape[0], -1).clone().addmm_(low, weight)


def _rowwise(transformer: Transformer) -> Iterator[Operation]:
    """What a layer does to each row alone, where a vector's tail may be computed otherwise."""
    config, norm, most = transformer.config, transformer.weights.norm, PROBED_ROWS[-1]
    yield "norm", (most, config.hidden), lambda x: rms_norm(x, norm, config.rms_eps)[0]
    yield "silu", (most, config.intermediate), functional.silu
    yield "silu backward", (most, config.intermediate), lambda x: torch.ops.aten.silu_backward(x, x)


def _attention_differs(kernels: CpuKernels, draw: Callable[..., torch.Tensor]) -> bool:
    """Rows of a tile, one and some, against the whole tile."""
    config, numerics, attention = kernels.config, kernels.numerics, kernels.attention
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
