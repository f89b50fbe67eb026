"""An adapter's gradients and its part of dx against products in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from adapters import DEVICE, GROUPS, LAYERS, SHAPES, Pass, kept, layout, outs, randn, served, trained
from bounds import close

from coserve_engine.config import LINEARS
from coserve_engine.device.protocol import Columns
from coserve_engine.kernels.protocol import DOWN, QKV
from coserve_engine.kernels.triton import lora, lora_backward, lora_tables
from coserve_engine.kernels.triton.lora_tables import Adapters, PassTables
from coserve_engine.layout.batch import Window
from coserve_engine.tensors.lora import AB, LoraWeights

LENGTHS, START = (70, 20, 64), 4
"""Of sequences: tiles of 64, 6, 20 and 64 rows; and where the adapter's gradients begin in their buffer."""


def tables(state: Pass) -> PassTables:
    found = PassTables.of(state, Adapters.create(LAYERS, DEVICE))  # type: ignore[arg-type]
    assert found is not None
    return found


class Grads:
    """Of an adapter, not zero before, in one buffer with nothing of it around."""

    def __init__(self, weights: LoraWeights) -> None:
        pairs = [(layer, name, pair) for layer, of in enumerate(weights.layers) for name, pair in of.items()]
        size = sum(pair.a.numel() + pair.b.numel() for *_, pair in pairs)
        self.whole = randn(9, size + 2 * START, dtype=torch.float32)
        self.flat = self.whole[START:-START]
        self.layers: list[dict[str, AB]] = [{} for _ in weights.layers]
        at = 0
        for layer, name, (a, b, *_) in pairs:
            middle, end = at + a.numel(), at + a.numel() + b.numel()
            self.layers[layer][name] = self.flat[at:middle].view(a.shape), self.flat[middle:end].view(b.shape)
            at = end


def backward(
    state: Pass,
    of: PassTables,
    dy: torch.Tensor,
    x: torch.Tensor,
    dx: torch.Tensor | None,
    units: Sequence[tuple[int, int]],
    layer: int,
    group: Sequence[str],
) -> tuple[torch.Tensor, ...]:
    """The buffer of gradients and dx, by units of tiles [first, end)."""
    grads = Grads(state.weights)
    dx = None if dx is None else dx.clone()
    for first, end in units:
        rows = slice(state.layout.spans[first].start, state.layout.spans[end - 1].stop)
        part = None if dx is None else dx[rows]
        lora_backward.lora_gradient(
            *(dy[rows], x[rows], part, grads.flat, grads.layers[layer], of, layer, group, outs(group)),
            *((first, end), rows),
        )
    return (grads.whole,) if dx is None else (grads.whole, dx)


def inputs(group: Sequence[str], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dy, x and what dx is before, whose rows are apart."""
    rows, into, out = sum(LENGTHS), SHAPES[group[0]][1], sum(outs(group))
    return tuple(randn(n, rows, width + 16, dtype=dtype)[:, :width] for n, width in enumerate((out, into, into)))  # type: ignore[return-value]


def truth(
    state: Pass, dy: torch.Tensor, x: torch.Tensor, dx: torch.Tensor, layer: int, group: Sequence[str]
) -> tuple[dict[str, AB], torch.Tensor]:
    dy, x, dx = dy.double(), x.double(), dx.double()
    grads = {}
    before = Grads(state.weights).layers[layer]
    for name, part in zip(group, dy.split(outs(group), 1), strict=True):
        pair = state.weights.layers[layer].get(name)
        if pair is not None:
            keep = kept(state.row_keys, layer, name, x.shape[1], state.p)
            dlow, low = pair.scale * part @ pair.b.double(), pair.scale * (x * keep) @ pair.a.double().t()
            a, b = before[name]
            grads[name] = a.double() + dlow.t() @ (x * keep), b.double() + part.t() @ low
            dx = dx + (dlow @ pair.a.double()) * keep
    return grads, dx


@pytest.mark.parametrize(("group", "p"), [(GROUPS[0], 0.3), (GROUPS[1], 0.0), (GROUPS[3], 0.5)])
def test_gradients(raced: Any, dtype: torch.dtype, group: tuple[str, ...], p: float) -> None:
    """Of rank 20, which is stored as 24."""
    weights = trained(served(2, 20, dtype, [name for name in LINEARS if name != "k_proj"]))
    state, layer = Pass(weights, LENGTHS, p), 1
    of, (dy, x, dx) = tables(state), inputs(group, dtype)
    units = [(1, 4), (0, 1)]

    def words() -> tuple[torch.Tensor, ...]:
        return backward(state, of, dy, x, dx, units, layer, group)

    whole, found_dx = raced(words) if dtype is torch.float32 and group == DOWN else words()
    expected, expected_dx = truth(state, dy, x, dx, layer, group)
    close(found_dx, expected_dx, dtype, sums=1.5)
    found, before = Grads(weights), Grads(weights)
    untouched = torch.ones(len(whole), dtype=torch.bool)
    for name, (a, b) in found.layers[layer].items():
        if name in group:
            for part, true in zip((a, b), expected[name], strict=True):
                at = part.storage_offset()
                untouched[at : at + part.numel()] = False
                close(whole[at : at + part.numel()].view(part.shape), true, dtype, sums=1.5)
    assert torch.equal(whole[untouched], before.whole[untouched])


def test_units_that_cut_a_pass_otherwise_change_no_bit(dtype: torch.dtype) -> None:
    """Gradients and dx of one unit, of two, and of one a tile."""
    state = Pass(trained(served(2, 8, dtype)), LENGTHS, 0.3)
    of, (dy, x, dx) = tables(state), inputs(DOWN, dtype)
    one, *others = (
        backward(state, of, dy, x, dx, units, 0, DOWN)
        for units in ([(0, 4)], [(1, 4), (0, 1)], [(3, 4), (2, 3), (1, 2), (0, 1)])
    )
    for other in others:
        assert all(map(torch.equal, one, other))
    forwards = backward(state, of, dy, x, dx, [(0, 1), (1, 4)], 0, DOWN)
    assert not torch.equal(one[0], forwards[0])  # the control: the order of tiles does


def test_what_forward_computed_is_computed_again(dtype: torch.dtype) -> None:
    """A unit's rows of `shrink` and `expand` have the bits that they had as a window's of a batch."""
    state, adapters = Pass(trained(served(2, 24, dtype)), (70,), 0.3), Adapters.create(LAYERS, DEVICE)
    columns, batch = Columns(), layout(22, [], [Window(0, 2, 22, 40)])
    windows = lora_tables.put(batch, {}, {0: state}, adapters, columns)(DEVICE.stage_columns(columns))  # type: ignore[dict-item]
    unit = tables(state).rows(40, 60)
    x, y = randn(0, 22, SHAPES["down_proj"][1], dtype=dtype), randn(1, 22, SHAPES["down_proj"][0], dtype=dtype)
    assert windows is not None
    found, again = y.clone(), y[2:].clone()
    lora.expand(lora.shrink(x, windows, 1, DOWN), found, windows, 1, DOWN, outs(DOWN))
    lora.expand(lora.shrink(x[2:], unit, 1, DOWN), again, unit, 1, DOWN, outs(DOWN))
    assert torch.equal(found[2:], again)
    assert not torch.equal(found[2:], y[2:])


@pytest.mark.parametrize("row", [0, 63, 64, 69, 70, 89, 90, 153])
def test_no_row_of_a_sum_is_lost(row: int) -> None:
    """Only one row has a derivative: the last ones of tiles that are full and not."""
    state = Pass(trained(served(0, 8, torch.float32, ("down_proj",))), LENGTHS, 0.0)
    of, (dy, x, _) = tables(state), inputs(DOWN, torch.float32)
    dy, x = torch.zeros_like(dy), torch.full_like(x, 2.0)
    dy[row, 143] = 1.0
    (whole,) = backward(state, of, dy, x, None, [(0, 4)], 0, DOWN)
    before = Grads(state.weights).layers[0]["down_proj"]
    pair = state.weights.layers[0]["down_proj"]
    dlow = pair.scale * pair.b[143].double()
    a = before[0].double() + dlow[:, None] * 2.0
    close(whole[START : START + a.numel()].view(a.shape), a, torch.float32, sums=1.5)


def test_what_the_adapter_lacks_is_not_launched() -> None:
    state = Pass(trained(served(0, 8, torch.float32, ("down_proj",))), LENGTHS, 0.0)
    dy, x, dx = inputs(QKV, torch.float32)
    whole, found = backward(state, tables(state), dy, x, dx, [(0, 4)], 0, QKV)
    assert torch.equal(found, dx)
    assert torch.equal(whole, Grads(state.weights).whole)


@pytest.mark.parametrize("wrong", ["tile", "rows", "key", "fold", "inverse"])
def test_a_wrong_table_would_be_seen(wrong: str) -> None:
    """The control."""
    state = Pass(trained(served(0, 8, torch.float32)), LENGTHS, 0.3)
    of, (dy, x, dx) = tables(state), inputs(DOWN, torch.float32)
    expected, _ = truth(state, dy, x, dx, 0, DOWN)
    if wrong == "tile":
        of.tiles[2, 0] -= 1
    elif wrong == "rows":
        of.tiles[0, 1] -= 1
    elif wrong == "key":
        of.slot[0, 1] -= 4
    elif wrong == "fold":
        of = replace(of, folds=of.folds ^ 1)
    else:
        of.slot[0, 3] ^= 1 << 20
    whole, _ = backward(state, of, dy, x, dx, [(0, 4)], 0, DOWN)
    part = Grads(state.weights).layers[0]["down_proj"][0]
    at = part.storage_offset()
    with pytest.raises(AssertionError):
        close(whole[at : at + part.numel()].view(part.shape), expected["down_proj"][0], torch.float32, sums=1.5)
