"""Adapters of a batch against their products in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import triton
import triton.language as tl
from adapters import DEVICE, GROUPS, HIDDEN, LAYERS, SHAPES, Pass, added, layout, outs, randn, requests, served, trained
from bounds import close
from hypothesis import HealthCheck, given, settings

from coserve_engine.device.protocol import Columns
from coserve_engine.kernels.dropout import dropout_mask, row_keys
from coserve_engine.kernels.protocol import DOWN, GATE_UP, QKV
from coserve_engine.kernels.triton import dropout, lora, lora_tables
from coserve_engine.kernels.triton.lora_tables import Adapters, LoraTables
from coserve_engine.layout.batch import BatchLayout, Window

NAN, ROWS = float("nan"), 58


@pytest.fixture(autouse=True)
def _split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of these few columns are split too."""
    monkeypatch.setattr(lora, "SPLIT_COLUMNS", 64)


@pytest.fixture
def adapters() -> Adapters:
    return Adapters.create(LAYERS, DEVICE)


def bound(batch: BatchLayout, of: Any, passes: Any, adapters: Adapters) -> LoraTables:
    columns = Columns()
    columns.ints([7])
    tables = lora_tables.put(batch, of, passes, adapters, columns)
    found = tables(DEVICE.stage_columns(columns))
    assert found is not None
    return found


def run(x: torch.Tensor, y: torch.Tensor, tables: LoraTables, layer: int, group: Sequence[str]) -> torch.Tensor:
    y = y.clone()
    lora.expand(lora.shrink(x, tables, layer, group), y, tables, layer, group, outs(group))
    return y


def mixed(dtype: torch.dtype) -> tuple[BatchLayout, Any, Any]:
    """Rows 0-30: of four adapters, one without a k_proj, neighbours and not, and rows of none; a window with dropout,
    and one without.
    """
    few = served(3, 24, dtype, ("q_proj", "v_proj", "down_proj"))
    of = requests(served(1, 8, dtype), few, served(2, 20, dtype), None, trained(served(4, 16, dtype)))
    groups = [(0, [0]), (1, [1, 4, 5, 9]), (2, range(10, 28)), (4, [3, 28, 30])]
    states = {
        7: Pass(trained(served(5, 16, dtype)), (40, 30), 0.3),
        8: Pass(trained(served(6, 8, dtype)), (30,), 0.0),
    }
    return layout(ROWS, groups, [Window(7, 31, 51, 30), Window(8, 51, 56, 3)]), of, states


def truth(
    x: torch.Tensor, y: torch.Tensor, batch: BatchLayout, of: Any, passes: Any, layer: int, group: Sequence[str]
) -> torch.Tensor:
    y = y.double()
    for slot, rows in batch.adapters:
        y[rows] += added(x[rows], of[slot].weights, layer, group)
    for pass_id, start, stop, first in batch.windows:
        state, rows = passes[pass_id], slice(start, stop)
        keys = state.row_keys[first : first + stop - start]
        y[rows] += added(x[rows], state.weights, layer, group, keys, state.p)
    return y


@triton.jit
def mask(keys_ptr, folds_ptr, out_ptr, which, threshold, N: tl.constexpr):
    rows = tl.load(keys_ptr + tl.arange(0, 16)).to(tl.uint32, bitcast=True)
    columns = dropout.column_keys(tl.arange(0, N), tl.load(folds_ptr + which))
    keep = dropout.kept(rows[:, None], columns[None, :], threshold)
    tl.store(out_ptr + tl.arange(0, 16)[:, None] * N + tl.arange(0, N)[None, :], keep.to(tl.int32))


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.9])
def test_masks_are_the_twin_s(p: float) -> None:
    keys = row_keys(2**63 + 11, 3, 2, torch.arange(5, 21))
    folds = Adapters.create(LAYERS, DEVICE).folds
    for layer, linear in ((0, 0), (1, 6)):
        found = torch.zeros(16, 256, dtype=torch.int32)
        mask[(1,)](keys, folds, found, layer * 7 + linear, round(p * 2.0**32) - (1 << 31), N=256)
        assert torch.equal(found.bool(), dropout_mask(keys, layer, list(SHAPES)[linear], 256, p))


@pytest.mark.parametrize(("layer", "group"), [(0, GROUPS[0]), (1, GROUPS[1]), (1, GROUPS[2]), (0, GROUPS[3])])
def test_adapters_of_a_batch(raced: Any, dtype: torch.dtype, adapters: Adapters, layer: int, group: Any) -> None:
    batch, of, passes = mixed(dtype)
    tables = bound(batch, of, passes, adapters)
    x = randn(0, ROWS, SHAPES[group[0]][1] + 16, dtype=dtype)[:, :-16]
    y = randn(1, ROWS, sum(outs(group)) + 16, dtype=dtype)[:, :-16]
    rest = [2, 6, 7, 8, 29, 56, 57]
    x[rest] = NAN

    def words() -> tuple[torch.Tensor, ...]:
        return (run(x, y, tables, layer, group),)

    (found,) = raced(words) if dtype is torch.float32 and group in (QKV, DOWN) else words()
    assert torch.equal(found[rest], y[rest])
    close(found, truth(x.nan_to_num(0), y, batch, of, passes, layer, group), dtype, sums=1.0)


def test_what_no_adapter_has_is_not_launched(adapters: Adapters) -> None:
    few = served(3, 8, torch.float32, ("q_proj",))
    tables = bound(layout(3, [(0, [0, 2])]), requests(few), {}, adapters)
    assert tables.adapts(QKV)
    assert not tables.adapts(GATE_UP)
    columns = Columns()
    assert lora_tables.put(layout(3, []), {}, {}, adapters, columns)(DEVICE.stage_columns(columns)) is None


def test_an_adapter_is_put_in_tables_once_and_forgotten_with_its_tensors(adapters: Adapters) -> None:
    weights = served(1, 8, torch.float32)
    assert adapters.table(weights) is adapters.table(weights)
    assert len(adapters.tables) == 1
    del weights
    assert len(adapters.tables) == 0


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_row_does_not_depend_on_its_batch(data: st.DataObject, adapters: Adapters) -> None:
    """Its bits, be its block of few rows or of many, its neighbours of its adapter or not."""
    ranks = data.draw(st.lists(st.sampled_from([4, 8, 17, 40]), min_size=2, max_size=3))
    of = requests(*(served(n, rank, torch.bfloat16) for n, rank in enumerate(ranks)))
    owner = data.draw(st.lists(st.integers(0, len(ranks) - 1), min_size=1, max_size=70))
    groups = [(n, [row for row, slot in enumerate(owner) if slot == n]) for n in range(len(ranks))]
    x = randn(9, len(owner), SHAPES["down_proj"][1], dtype=torch.bfloat16)
    y = randn(8, len(owner), HIDDEN, dtype=torch.bfloat16)
    batch = layout(len(owner), [(n, rows) for n, rows in groups if rows])
    found = run(x, y, bound(batch, of, {}, adapters), 1, DOWN)
    close(found, truth(x, y, batch, of, {}, 1, DOWN), torch.bfloat16, sums=1.0)
    row = data.draw(st.integers(0, len(owner) - 1))
    alone = bound(layout(1, [(owner[row], [0])]), of, {}, adapters)
    assert torch.equal(run(x[row : row + 1], y[row : row + 1], alone, 1, DOWN), found[row : row + 1])


def test_many_rows_and_few_have_the_same_bits(adapters: Adapters, dtype: torch.dtype) -> None:
    of = requests(served(0, 24, dtype))
    x, y = randn(2, 70, SHAPES["down_proj"][1], dtype=dtype), randn(3, 70, HIDDEN, dtype=dtype)
    together = bound(layout(70, [(0, range(70))]), of, {}, adapters)
    assert together.block_rows == lora_tables.MANY
    found = run(x, y, together, 0, DOWN)
    parts = [(0, 10), (10, 70)]
    for start, stop in parts:
        some = bound(layout(stop - start, [(0, range(stop - start))]), of, {}, adapters)
        assert some.block_rows == lora_tables.FEW
        assert torch.equal(run(x[start:stop], y[start:stop], some, 0, DOWN), found[start:stop])


def test_other_adapters_may_stand_in_the_tables_of_a_captured_launch(adapters: Adapters) -> None:
    """What a graph does when it is replayed: the same launches on the same tensors, which say something else."""
    dtype = torch.float32
    first = requests(served(0, 8, dtype), served(1, 16, dtype))
    second = requests(served(2, 20, dtype), served(3, 8, dtype, ("q_proj",)), served(4, 8, dtype))
    then = layout(12, [(0, [0, 5]), (1, [1, 2, 3]), (2, range(7, 12))])
    captured = LoraTables.nobodys(adapters, 4, 12, 24)
    x, y = randn(2, 12, HIDDEN, dtype=dtype), randn(3, 12, sum(outs(QKV)), dtype=dtype)
    for batch, of in ((layout(12, [(0, range(8)), (1, [8, 10])]), first), (then, second)):
        captured.fill(bound(batch, of, {}, adapters))
        close(run(x, y, captured, 1, QKV), truth(x, y, batch, of, {}, 1, QKV), dtype, sums=1.0)
    captured.fill(None)
    assert torch.equal(run(x, y, captured, 1, QKV), y)


@pytest.mark.parametrize("parts", [[40], [1] * 7 + [33], [16, 24], [17, 17, 6], [1, 39], [9] * 4])
def test_rows_of_any_parting_have_room_in_the_tables_of_a_captured_launch(adapters: Adapters, parts: list[int]) -> None:
    rows, groups, at = sum(parts), [], 0
    for n, count in enumerate(parts):
        groups.append((n, range(at, at + count)))
        at += count
    of = requests(*(served(n, 8, torch.float32) for n in range(len(parts))))
    tables = bound(layout(rows, groups), of, {}, adapters)
    captured = LoraTables.nobodys(adapters, len(parts), rows, 8)
    captured.fill(tables)
    assert torch.equal(captured.blocks[: len(tables.blocks)], tables.blocks)
    x, y = randn(2, rows, HIDDEN, dtype=torch.float32), randn(3, rows, sum(outs(QKV)), dtype=torch.float32)
    assert torch.equal(run(x, y, captured, 1, QKV), run(x, y, tables, 1, QKV))


@pytest.mark.parametrize("block", [lora_tables.FEW, lora_tables.MANY])
def test_windows_that_drop_may_stand_in_the_tables_of_a_captured_launch(adapters: Adapters, block: int) -> None:
    """To the bit, and a launch that drops serves a batch that drops nothing; one that does not drop is no such."""
    length = 20 if block == lora_tables.FEW else 70
    weights, of = trained(served(5, 16, torch.float32)), requests(served(0, 8, torch.float32))
    passes = {n: Pass(weights, (length,), p) for n, p in enumerate((0.3, 0.0))}
    captured = LoraTables.nobodys(adapters, 3, length + 6, 16, block_rows=block, drops=True)
    wrong = LoraTables.nobodys(adapters, 3, length + 6, 16, block_rows=block)
    x, y = randn(2, length + 6, HIDDEN, dtype=torch.float32), randn(3, length + 6, sum(outs(QKV)), dtype=torch.float32)
    for n in range(2):
        tables = bound(layout(length + 6, [(0, [1, 3])], [Window(n, 5, 5 + length, 0)]), of, passes, adapters)
        assert tables.block_rows == block
        assert tables.drops == (n == 0)
        captured.fill(tables)
        wrong.fill(tables)
        expected = run(x, y, tables, 1, QKV)
        assert torch.equal(run(x, y, captured, 1, QKV), expected)
        assert torch.equal(run(x, y, wrong, 1, QKV), expected) == (n == 1)


@pytest.mark.parametrize("k", [0, 63, 64, 127, 128, 143])
def test_no_term_of_a_sum_is_lost(adapters: Adapters, k: int) -> None:
    """Only one input of A is there, and one output of B, in the last rank of a chunk that is not full."""
    weights = served(0, 20, torch.float32, ("v_proj",))
    pair = weights.layers[0]["v_proj"]
    pair.a.zero_()[19, k] = 3.0
    pair.b.zero_()[KEY, 19] = 5.0
    tables = bound(layout(2, [(0, [1])]), requests(weights), {}, adapters)
    x, y = torch.zeros(2, HIDDEN), torch.zeros(2, sum(outs(QKV)))
    x[1, k] = 1.0
    found = run(x, y, tables, 0, QKV)
    expected = torch.zeros_like(y)
    expected[1, SHAPES["q_proj"][0] + SHAPES["k_proj"][0] + KEY] = 15.0 * pair.scale
    assert torch.equal(found, expected)


KEY = 47


@pytest.mark.parametrize("wrong", ["slot", "fold", "threshold", "key", "scale", "place", "order"])
def test_a_wrong_table_would_be_seen(adapters: Adapters, wrong: str) -> None:
    """The control."""
    batch, of, passes = mixed(torch.float32)
    tables = bound(batch, of, passes, adapters)
    x, y = randn(0, ROWS, SHAPES["down_proj"][1], dtype=torch.float32), randn(1, ROWS, HIDDEN, dtype=torch.float32)
    true = truth(x, y, batch, of, passes, 0, DOWN)
    if wrong == "slot":
        tables.blocks[0, 2] += 1
    elif wrong == "fold":
        tables = replace(tables, folds=tables.folds ^ 1)
    elif wrong == "threshold":
        tables.slots[4, 2] += 1 << 26
    elif wrong == "key":
        tables.slots[4, 1] += 4
    elif wrong == "scale":
        tables.entries[6, 0, 3] ^= 1 << 20
    elif wrong == "place":
        tables.blocks[0, 3] += 1
    else:
        tables.order[1] += 1
    with pytest.raises(AssertionError):
        close(run(x, y, tables, 0, DOWN), true, torch.float32, sums=1.0)
