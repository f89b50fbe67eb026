"""Attention of mixed batches over scattered pages against its definition in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import triton.language as tl
from bounds import EPSILON, close
from paged import Pool, attention, staged, within

from coserve_engine.kernels.bound import put_table
from coserve_engine.kernels.triton import attention as kernels
from coserve_engine.kernels.triton.attention_parts import Heads
from coserve_engine.kernels.triton.attention_tables import CallTables, put_calls
from coserve_engine.layout.batch import BatchLayout, lay_out
from coserve_engine.layout.choices import Choice
from coserve_engine.layout.passes import PassLayout
from coserve_engine.numerics import Numerics
from coserve_engine.scheduler.plan import Kind, Segment

TILE = 64


@dataclass(frozen=True, slots=True)
class Request:
    tokens: list[int]
    pages: tuple[int, ...]
    adapter: None = None
    scored: None = None

    def choice(self) -> Choice:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of sequences of a pool, as the engine lays them out; `where`: sequence, first position and number of rows
    that follow each other.
    """

    pool: Pool
    layout: BatchLayout
    where: list[tuple[int, int, int]]

    @classmethod
    def of(
        cls,
        pool: Pool,
        contexts: list[int] | None = None,
        chunk: tuple[int, int, int] | None = None,
        tuned: list[int] | None = None,
    ) -> Batch:
        """A decode row at the end of each of the `contexts`, rows [start, stop) of a sequence, and all of `tuned`."""
        contexts, tuned = contexts or [], tuned or []
        requests = {s: Request([0] * keys.shape[1], pool.pages[s]) for s, keys in enumerate(pool.keys)}
        ends = {s: pool.keys[s].shape[1] - 1 for s in contexts}
        segments = [Segment(Kind.DECODE, s, ends[s], 1) for s in contexts]
        where = [(s, position, 1) for s, position in ends.items()]
        if chunk is not None:
            segments.append(Segment(Kind.PREFILL, chunk[0], chunk[1], chunk[2] - chunk[1]))
            where.append((chunk[0], chunk[1], chunk[2] - chunk[1]))
        passes = {}
        if tuned:
            pages = tuple(page for s in tuned for page in pool.pages[s])
            passes[9] = PassLayout.of([requests[s].tokens for s in tuned], pages, pool.numerics, training=True)
            segments.append(Segment(Kind.FINETUNE, 9, 0, passes[9].rows))
            where += [(s, 0, len(requests[s].tokens)) for s in tuned]
        return cls(pool, lay_out(tuple(segments), requests, passes, pool.numerics), where)

    def true(self, q: torch.Tensor, window: int | None, *, sizes: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """o and the log-sum-exp of all rows that are not padding; `sizes`: of the values' sizes instead."""
        parts, row = [], 0
        for s, first, count in self.where:
            values = self.pool.values[s].abs() if sizes else self.pool.values[s]
            parts.append(attention(q[row : row + count], self.pool.keys[s], values, first, window))
            row += count
        return torch.cat([o for o, _ in parts]), torch.cat([lse for _, lse in parts])


def heads_of(pool: Pool, heads: int, window: int | None) -> Heads:
    kv_heads, _, size = pool.k.shape
    return Heads(heads, kv_heads, size, pool.numerics.tile, pool.numerics.page, window, hopper=True)


def attend(q: torch.Tensor, batch: Batch, of: Heads) -> tuple[torch.Tensor, torch.Tensor]:
    layout, pool = batch.layout, batch.pool
    o, lse = torch.empty_like(q), torch.full(q.shape[:2], math.nan)
    calls = staged(lambda columns: put_calls(layout, pool.numerics, columns))
    pages = staged(lambda columns: put_table(layout.singles, columns))
    kernels.decode(q, pool.k, pool.v, torch.tensor(layout.positions), pages, o, of)
    kernels.forward(q, pool.k, pool.v, calls, o, lse, of)
    return o[: layout.rows], lse[: layout.rows]


def queries(batch: Batch, heads: int, dtype: torch.dtype) -> torch.Tensor:
    shape = (len(batch.layout.tokens), heads, batch.pool.k.shape[2])
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5)).to(dtype)


def mixed(kv_heads: int, size: int, dtype: torch.dtype, page: int) -> Batch:
    pool = Pool.drawn([130, 64, 7, 150, 84, 20], kv_heads, size, dtype, Numerics(page=page))
    return Batch.of(pool, [0, 1, 2], (3, 70, 150), [4, 5])


def check(found: tuple[torch.Tensor, torch.Tensor], q: torch.Tensor, batch: Batch, window: int | None) -> None:
    (o, lse), (true, true_lse) = found, batch.true(q, window)
    singles = len(batch.layout.singles)
    within(o, true, batch.true(q, window, sizes=True)[0], (2 if q.dtype == torch.bfloat16 else 4) * EPSILON[q.dtype])
    close(lse[singles:], true_lse[singles:], torch.float32, sums=2)
    assert bool(lse[:singles].isnan().all())


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "window", "page"),
    [(4, 2, 16, None, 64), (4, 1, 32, 50, 16), (6, 2, 24, 70, 16), (1, 1, 64, 1, 32), (2, 1, 96, 64, 64)],
)
def test_a_mixed_batch(dtype: torch.dtype, heads: int, kv_heads: int, size: int, window: int | None, page: int) -> None:
    batch = mixed(kv_heads, size, dtype, page)
    q = queries(batch, heads, dtype)
    check(attend(q, batch, heads_of(batch.pool, heads, window)), q, batch, window)


@pytest.mark.parametrize("page", [16, 64])
def test_no_two_programs_touch_one_address(raced: Any, page: int) -> None:
    pool = Pool.drawn([200, 9, 70], 2, 16, torch.float32, Numerics(page=page))
    batch = Batch.of(pool, [0, 1], (2, 50, 70))
    q = queries(batch, 4, torch.float32)
    check(raced(lambda: attend(q, batch, heads_of(pool, 4, None))), q, batch, None)


def test_a_layer_of_a_real_model(dtype: torch.dtype) -> None:
    pool = Pool.drawn([70, 72], 8, 128, dtype, Numerics())
    batch = Batch.of(pool, [0], (1, 0, 72))
    q = queries(batch, 32, dtype)
    check(attend(q, batch, heads_of(pool, 32, None)), q, batch, None)


def test_a_row_has_the_bits_that_it_has_alone(dtype: torch.dtype) -> None:
    batch = mixed(2, 16, dtype, 16)
    q, of = queries(batch, 4, dtype), heads_of(batch.pool, 4, None)
    o, _ = attend(q, batch, of)
    for row, context in enumerate((0, 1, 2)):
        alone = Batch.of(batch.pool, [context])
        assert torch.equal(attend(q[row : row + 1].expand(4, -1, -1).contiguous(), alone, of)[0][0], o[row])
    for start, stop in ((70, 101), (101, 150)):
        part = Batch.of(batch.pool, [], (3, start, stop))
        rows = slice(3 + start - 70, 3 + stop - 70)
        padded = torch.zeros(len(part.layout.tokens), 4, 16, dtype=dtype)
        padded[: stop - start] = q[rows]
        assert torch.equal(attend(padded, part, of)[0], o[rows])


def test_splits_of_another_length_would_change_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    batch = Batch.of(Pool.drawn([330], 1, 16, torch.float32, Numerics()), [0])
    q, of = queries(batch, 1, torch.float32), heads_of(batch.pool, 1, None)
    o, _ = attend(q, batch, of)
    monkeypatch.setattr(kernels, "LEAST_TILES", tl.constexpr(1))
    other, _ = attend(q, batch, of)
    assert torch.allclose(o, other, atol=1e-5)
    assert not torch.equal(o, other)


def test_keys_of_half_a_tile_at_once() -> None:
    """As on a device before Hopper, where heads are wide."""
    batch = Batch.of(Pool.drawn([130, 84], 1, 144, torch.float32, Numerics(page=16)), [0], (1, 50, 84))
    q = queries(batch, 2, torch.float32)
    check(attend(q, batch, replace(heads_of(batch.pool, 2, 40), hopper=False)), q, batch, 40)


def test_many_heads_share_one_of_keys() -> None:
    batch = Batch.of(Pool.drawn([70, 30], 1, 16, torch.float32, Numerics()), [0], (1, 20, 30))
    q = queries(batch, 20, torch.float32)
    check(attend(q, batch, heads_of(batch.pool, 20, None)), q, batch, None)


# ---- needles: keys are codes of their positions, and a query finds one of them ----


def code(positions: torch.Tensor) -> torch.Tensor:
    """[N, 16]: other positions score at least 2048 less."""
    return (positions[:, None] >> torch.arange(16) & 1).mul(128).sub(64).float()


def haystack(length: int, dtype: torch.dtype, page: int = 64) -> Pool:
    """Values are tile and place in it."""
    at = torch.arange(length)
    values = torch.stack([at // TILE, at % TILE] + [at * 0] * 14, 1).float()
    return Pool.of([code(at)[None].to(dtype)], [values[None].to(dtype)], Numerics(page=page))


def found(o: torch.Tensor) -> list[int]:
    """Positions that rows [R, 1, 16] found."""
    assert bool((o == o.round()).all())
    return (o[:, 0, 0].int() * TILE + o[:, 0, 1].int()).tolist()


def look(pool: Pool, rows: list[tuple[int, int]], window: int | None = None) -> torch.Tensor:
    """o of decode rows (position, needle) of one sequence."""
    positions, needles = (torch.tensor(column) for column in zip(*rows, strict=True))
    q = code(needles)[:, None].to(pool.k.dtype)
    most = max(position // TILE + 1 for position, _ in rows) * TILE // pool.numerics.page
    table = torch.tensor([pool.pages[0] + (0,) * (most - len(pool.pages[0]))])[:, :most].expand(len(rows), -1)
    o = torch.empty_like(q)
    kernels.decode(q, pool.k, pool.v, positions, table.contiguous(), o, heads_of(pool, 1, window))
    return o


@pytest.mark.parametrize(
    ("position", "needles"),
    [
        (8191, [0, 511, 512, 8191]),  # 128 tiles, splits of 8
        (2047, [127, 128, 2047]),  # 32 tiles, splits of 2
        (2048, [255, 256, 2048]),  # 33 tiles, splits of 4
        (16384, [1024, 16384]),  # 257 tiles, splits of 16
    ],
)
def test_a_decode_row_finds_each_key(position: int, needles: list[int]) -> None:
    pool = haystack(position + 1, torch.float32)
    assert found(look(pool, [(position, needle) for needle in needles])) == needles


@pytest.mark.parametrize("page", [16, 64])
def test_rows_find_keys_at_the_ends_of_pages(dtype: torch.dtype, page: int) -> None:
    pool = haystack(330, dtype, page)
    ends = [0, 15, 16, 63, 64, 127, 128, 191, 192, 319, 320, 329]
    assert found(look(pool, [(329, needle) for needle in ends])) == ends
    batch = Batch.of(pool, [], (0, 318, 330))
    o, _ = attend(code(torch.tensor(ends))[:, None].to(dtype), batch, heads_of(pool, 1, None))
    assert found(o[-3:]) == ends[-3:]
    assert found(o[:9]) == ends[:9]


@pytest.mark.parametrize("window", [1, 63, 64, 65, 100, 130])
def test_a_window_ends_where_it_should(window: int) -> None:
    pool = haystack(330, torch.float32, 16)
    rows = [(position, position + 1 - window) for position in (200, 255, 256, 319)]
    assert found(look(pool, rows, window)) == [needle for _, needle in rows]
    batch = Batch.of(pool, [], (0, 250, 266))
    needles = torch.arange(250, 266) + 1 - window
    of = heads_of(pool, 1, window)
    assert found(attend(code(needles)[:, None], batch, of)[0]) == needles.tolist()
    unseen = attend(code(needles - 1)[:, None], batch, of)[0]
    close(unseen, batch.true(code(needles - 1)[:, None], window)[0], torch.float32)


def test_a_prompt_finds_the_first_and_the_last_of_many_keys() -> None:
    pool = haystack(8192, torch.float32)
    needles = torch.tensor([0, 63, 8127, 8191])
    batch = Batch.of(pool, [], (0, 8188, 8192))
    assert found(attend(code(needles)[:, None], batch, heads_of(pool, 1, None))[0]) == needles.tolist()


def test_calls_of_one_sequence_share_its_pages() -> None:
    batch = mixed(1, 16, torch.float32, 16)
    tables = staged(lambda columns: put_calls(batch.layout, batch.pool.numerics, columns))
    assert len(tables.calls) == len(batch.layout.calls) == 5
    assert len(tables.pages) == (192 + 128 + 64) // 16


# ---- how far a row is split ----


def splits(count: int) -> int:
    """Of a row that sees so many tiles: at most 16, or 32 beyond 256 tiles, of a power of two of at least two."""
    length, most = 2, 32 if count > 256 else 16
    while length * most < count:
        length *= 2
    return -(-count // length)


def test_no_row_is_split_further_than_a_launch_has_programs() -> None:
    most = 0
    for tiles in range(1, 3000):
        most = max(most, splits(tiles))
        assert kernels.most_splits(tiles) == most


# ---- controls: what is broken on purpose is seen ----


def _other_page(tables: CallTables) -> CallTables:
    return tables._replace(pages=tables.pages.roll(1))


def _one_key_more(tables: CallTables) -> CallTables:
    return tables._replace(calls=tables.calls + torch.tensor([0, 0, 1, 0, 0]))


@pytest.mark.parametrize("broken", [_other_page, _one_key_more])
def test_wrong_tables_are_seen(monkeypatch: pytest.MonkeyPatch, broken: Callable[[CallTables], CallTables]) -> None:
    batch, real = mixed(2, 16, torch.float32, 16), kernels.forward
    q = queries(batch, 4, torch.float32)

    def forward(q: Any, k: Any, v: Any, tables: CallTables, *rest: Any) -> None:
        real(q, k, v, broken(tables), *rest)

    monkeypatch.setattr(kernels, "forward", forward)
    with pytest.raises(AssertionError):
        check(attend(q, batch, heads_of(batch.pool, 4, None)), q, batch, None)


def test_a_wrong_scale_or_window_is_seen() -> None:
    batch = mixed(2, 16, torch.float32, 16)
    q, of = queries(batch, 4, torch.float32), heads_of(batch.pool, 4, 50)
    for wrong in (replace(of, window=51), replace(of, window=None)):
        with pytest.raises(AssertionError):
            check(attend(q, batch, wrong), q, batch, 50)
    with pytest.raises(AssertionError):
        check(attend((q * 1.001), batch, of), q, batch, 50)
