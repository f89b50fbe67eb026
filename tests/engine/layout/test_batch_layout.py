"""A layout puts every row in one place of its own, whatever the plan; one that is off by a little is found out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coserve_engine.layout.batch import AdapterGroup, BatchLayout, lay_out
from coserve_engine.layout.choices import Choice
from coserve_engine.layout.passes import PassLayout, pages_of_pass
from coserve_engine.messages import SamplingParams
from coserve_engine.numerics import Numerics
from coserve_engine.scheduler.pages import NULL_PAGE
from coserve_engine.scheduler.plan import Kind, Segment

NUMERICS = (Numerics(), Numerics(64, 16, 4), Numerics(7, 64, 4), Numerics(1, 64, 1), Numerics(16, 32, 8))


@dataclass(frozen=True)
class Sequence:
    tokens: tuple[int, ...]
    pages: tuple[int, ...]
    adapter: int | None
    scored: int | None = None

    def choice(self) -> Choice:
        return Choice(SamplingParams(1), len(self.tokens))


class Work(NamedTuple):
    """What `lay_out` is given."""

    segments: tuple[Segment, ...]
    sequences: Mapping[int, Sequence]
    passes: Mapping[int, PassLayout]
    numerics: Numerics

    def laid_out(self) -> BatchLayout:
        return lay_out(*self)

    def sources(self) -> list[tuple[Segment, int, int, tuple[int, ...]]]:
        """Of each row: its segment, token, position, and the pages of its sequence."""
        found = []
        for s in self.segments:
            for at in range(s.start, s.start + s.length):
                if s.kind is Kind.FINETUNE:
                    rows, base, seq = self.passes[s.slot], 0, 0
                    while at >= base + rows.lengths[seq]:
                        base, seq = base + rows.lengths[seq], seq + 1
                    found.append((s, rows.tokens[at], at - base, rows.tables[seq]))
                else:
                    sequence = self.sequences[s.slot]
                    found.append((s, sequence.tokens[at], at, sequence.pages))
        return found


@st.composite
def works(draw: st.DrawFn) -> Work:
    numerics = draw(st.sampled_from(NUMERICS))
    pool = draw(st.permutations(range(1, 400)))
    taken = 0

    def pages(count: int) -> tuple[int, ...]:
        nonlocal taken
        taken += count
        return tuple(pool[taken - count : taken])

    sequences, decode, prefill, windows = {}, [], [], []
    for slot in range(draw(st.integers(0, 6))):
        start, length = draw(st.integers(0, 200)), draw(st.integers(1, 90))
        kind = draw(st.sampled_from((Kind.DECODE, Kind.PREFILL)))
        length = 1 if kind is Kind.DECODE else length
        tokens = tuple(1000 * slot + at for at in range(start + length))
        adapter, top = draw(st.sampled_from((None, 7, 8))), draw(st.sampled_from((None, 0, 5)))
        held = pages(numerics.pages(start + length) + draw(st.integers(0, 2)))
        sequences[slot] = Sequence(tokens, held, adapter, top)
        sample = kind is Kind.DECODE or draw(st.booleans())
        (decode if kind is Kind.DECODE else prefill).append(Segment(kind, slot, start, length, sample))
    passes = {}
    for pass_id in range(50, 50 + draw(st.integers(0, 2))):
        lengths = tuple(draw(st.lists(st.integers(1, 150), min_size=1, max_size=3)))
        tokens_of = [tuple(100_000 * n + at for at in range(length)) for n, length in enumerate(lengths, 1)]
        rows = PassLayout.of(tokens_of, pages(pages_of_pass(lengths, numerics)), numerics, training=draw(st.booleans()))
        first = draw(st.integers(0, len(rows.spans) - 1))
        last = draw(st.integers(first, len(rows.spans) - 1))
        start = rows.spans[first].start
        windows.append(Segment(Kind.FINETUNE, pass_id, start, rows.spans[last].stop - start))
        passes[pass_id] = rows
    segments = (*decode, *prefill, *windows)
    if not segments:
        sequences[0] = Sequence((5,), pages(numerics.pages(1)), None)
        segments = (Segment(Kind.DECODE, 0, 0, 1, True),)
    return Work(segments, sequences, passes, numerics)


def broken(work: Work, layout: BatchLayout) -> set[str]:
    """Names of the properties that `layout` of `work` does not have."""
    numerics, sources = work.numerics, work.sources()
    page, rows = numerics.page, len(sources)
    padded = numerics.pad(rows)
    found = set()
    if layout.rows != rows or not len(layout.tokens) == len(layout.positions) == len(layout.write) == padded:
        return {"padding"}
    if any(place // page != NULL_PAGE for place in layout.write[rows:]):
        found.add("padding")
    if layout.tokens[:rows] != tuple(token for _, token, _, _ in sources):
        found.add("tokens")
    if layout.positions[:rows] != tuple(position for _, _, position, _ in sources):
        found.add("positions")
    places = [pages[position // page] * page + position % page for _, _, position, pages in sources]
    if list(layout.write[:rows]) != places or len(set(layout.write[:rows])) != rows:
        found.add("places")
    calls = (*layout.singles, *layout.calls)
    if Counter(row for call in calls for row in range(call.start, call.stop)) != Counter(range(rows)):
        found.add("calls")
    for call in calls:
        first = call.tile_end - numerics.tile + call.first
        for row in range(call.start, min(call.stop, rows)):
            segment, _, position, pages = sources[row]
            mine = pages[: len(call.pages)]
            rest = (NULL_PAGE,) * (len(call.pages) - len(mine))
            whole = len(call.pages) == numerics.pages(call.tile_end) and call.pages == (*mine, *rest)
            one_tile = call.tile_end - numerics.tile <= position < call.tile_end
            if not (whole and one_tile and position == first + row - call.start):
                found.add("calls")
            kept = segment.kind is Kind.FINETUNE and work.passes[segment.slot].training
            if call.want_lse is not kept:
                found.add("log-sum-exp")
    decoding = sum(segment.kind is Kind.DECODE for segment in work.segments)
    if [(c.start, c.stop) for c in layout.singles] != [(n, n + 1) for n in range(decoding)]:
        found.add("decode first")
    adapted = {n: work.sequences[s.slot].adapter for n, (s, *_) in enumerate(sources) if s.kind is not Kind.FINETUNE}
    given_to = [(row, work.sequences[group.slot].adapter) for group in layout.adapters for row in group.rows]
    if sorted(given_to) != sorted((row, adapter) for row, adapter in adapted.items() if adapter is not None):
        found.add("adapters")
    if len({adapter for _, adapter in given_to}) != len(layout.adapters):
        found.add("adapters")
    windows = [
        (w.pass_id, w.first + n) for w in layout.windows for n in range(w.stop - w.start) if sources[w.start + n]
    ]
    expected = [(s.slot, s.start + n) for s in work.segments if s.kind is Kind.FINETUNE for n in range(s.length)]
    if windows != expected or [w.stop for w in layout.windows][-1:] not in ([], [rows]):
        found.add("windows")
    ends, row = [], 0
    for segment in work.segments:
        row += segment.length
        if segment.sample:
            ends.append((segment.slot, row - 1))
    samples = list(layout.sample_rows)
    if list(zip(layout.sample_slots, samples, strict=False)) != ends or len(samples) != numerics.pad(len(ends)):
        found.add("samples")
    if [c.position for c in layout.choices] != [len(work.sequences[slot].tokens) for slot, _ in ends]:
        found.add("samples")
    scored: dict[int, list[int]] = {}
    for n, (s, *_) in enumerate(sources):
        if s.kind is not Kind.FINETUNE and work.sequences[s.slot].scored is not None:
            scored.setdefault(s.slot, []).append(n)
    asked = []
    for slot, members in scored.items():
        following = [work.sequences[slot].tokens[at + 1 : at + 2] for at in (sources[n][2] for n in members)]
        targets = tuple(token for some in following for token in some)
        asked += [(slot, members[0], targets, work.sequences[slot].scored)] if targets else []
    if list(layout.scored) != asked:
        found.add("scored")
    if set(samples[len(ends) :]) - {samples[len(ends) - 1]} if ends else samples:
        found.add("samples")
    return found


@given(works())
def test_a_layout_has_every_property(work: Work) -> None:
    assert broken(work, work.laid_out()) == set()


BREAKS: dict[str, Callable[[BatchLayout], BatchLayout]] = {
    "places": lambda b: replace(b, write=(b.write[1], *b.write[1:])),
    "calls": lambda b: replace(b, calls=(b.calls[0]._replace(stop=b.calls[0].stop - 1), *b.calls[1:])),
    "log-sum-exp": lambda b: replace(b, calls=(*b.calls[:-1], b.calls[-1]._replace(want_lse=False))),
    "decode first": lambda b: replace(b, singles=b.singles[1:], calls=(*b.calls, b.singles[0])),
    "adapters": lambda b: replace(b, adapters=(AdapterGroup(0, [*b.adapters[0].rows, 1]), *b.adapters[1:])),
    "windows": lambda b: replace(b, windows=(b.windows[0]._replace(first=64),)),
    "samples": lambda b: replace(b, sample_rows=(b.sample_rows[0] + 1, *b.sample_rows[1:])),
    "scored": lambda b: replace(b, scored=(b.scored[0]._replace(start=b.scored[0].start + 1),)),
    "padding": lambda b: replace(b, write=(*b.write[:-1], 64)),
    "positions": lambda b: replace(b, positions=(b.positions[0] + 1, *b.positions[1:])),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_one_fails(name: str) -> None:
    """The control: what `broken` sees of layouts that are off by a little."""
    numerics = Numerics()
    sequences = {
        0: Sequence(tuple(range(70)), (1, 2), 7),
        1: Sequence(tuple(range(9)), (3,), None),
        2: Sequence(tuple(range(80)), (5, 4), 7, 3),
    }
    passes = {50: PassLayout.of([tuple(range(100))], (8, 9), numerics, training=True)}
    segments = (
        Segment(Kind.DECODE, 0, 69, 1, True),
        Segment(Kind.DECODE, 1, 8, 1, True),
        Segment(Kind.PREFILL, 2, 3, 77, True),
        Segment(Kind.FINETUNE, 50, 0, 64),
    )
    work = Work(segments, sequences, passes, numerics)
    layout = work.laid_out()
    assert broken(work, layout) == set()
    assert name in broken(work, BREAKS[name](layout))


def test_a_pass_covers_its_tokens_tile_by_tile() -> None:
    rows = PassLayout.of([(1, 2, 3), tuple(range(70))], (9, 5, 6), Numerics(), training=True)
    assert rows.lengths == (4, 72)
    assert rows.tables == ((9,), (5, 6))
    assert rows.pages == ((9,), (5,), (5, 6))
    assert rows.tokens[:6] == (1, 2, 3, 0, 0, 1)
    assert rows.positions[3:6] == (3, 0, 1)
    assert rows.write[:5] == (576, 577, 578, 579, 320)
    assert rows.write[-1] == 6 * 64 + 7
    assert [(s.start, s.stop) for s in rows.spans] == [(0, 4), (4, 68), (68, 76)]
