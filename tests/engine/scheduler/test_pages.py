"""No page of the cache has two owners, and none is lost."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from coserve_engine.errors import OutOfPagesError
from coserve_engine.messages import (
    AddRequest,
    Cancel,
    PassDone,
    SamplingParams,
    StopJob,
)
from coserve_engine.scheduler.pages import NULL_PAGE, PageLedger
from coserve_engine.scheduler.runs import FreeRuns

TOTAL = 20
KINDS = ("request:", "pass:")


class Ledger(RuleBasedStateMachine):
    """Reserve, share, extend and free in any order, against plain dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.scrubbed: list[int] = []
        self.ledger = PageLedger(TOTAL, self.scrubbed.extend)
        self.owned: dict[str, tuple[int, ...]] = {}
        self.chains: dict[str, list[bytes]] = {}
        """Keys of the first pages of an owner, also after it has gone."""
        self.tainted: set[str] = set()
        self.dirty: set[int] = set()
        """Pages that a tainted owner wrote since they were scrubbed last."""
        self.count = 0

    def took(self, owner: str, pages: tuple[int, ...], fresh: tuple[int, ...]) -> None:
        assert set(fresh) & self.dirty <= set(self.scrubbed), "a page changed hands as a tainted owner left it"
        self.dirty -= set(self.scrubbed)
        self.scrubbed.clear()
        if owner in self.tainted:
            self.dirty |= set(fresh)
        self.owned[owner] = pages

    @rule(kind=st.sampled_from(("request:", "pass:")), count=st.integers(0, TOTAL), tainted=st.booleans())
    def reserve(self, kind: str, count: int, tainted: bool) -> None:
        self.count += 1
        owner, free = f"{kind}{self.count}", self.ledger.free_pages
        if count and count + self.ledger.headroom > free:
            with pytest.raises(OutOfPagesError) as caught:
                self.ledger.reserve(owner, count)
            assert self.ledger.free_pages == free
            assert caught.value.lacking == count + self.ledger.headroom - free
            return
        if tainted:
            self.tainted.add(owner)
        pages = self.ledger.reserve(owner, count, tainted=tainted)
        assert len(pages) == count
        self.took(owner, pages, pages)

    @rule(pages=st.integers(0, 4))
    def set_headroom(self, pages: int) -> None:
        self.ledger.headroom = pages

    @precondition(lambda self: self.chains)
    @rule(data=st.data(), fresh=st.integers(1, 4))
    def share(self, data: st.DataObject, fresh: int) -> None:
        keys = self.chains[data.draw(st.sampled_from(sorted(self.chains)))]
        found = self.ledger.match(keys)
        self.count += 1
        owner = f"request:{self.count}"
        try:
            pages = self.ledger.reserve(owner, len(found) + fresh, found)
        except OutOfPagesError:
            return
        assert pages[: len(found)] == found
        self.took(owner, pages, pages[len(found) :])
        self.chains[owner] = keys[: len(found)]

    @precondition(lambda self: any(o.startswith("request:") for o in self.owned))
    @rule(data=st.data())
    def register(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(o for o in self.owned if o.startswith("request:"))))
        chain = self.chains.setdefault(owner, [])
        if len(chain) < len(self.owned[owner]):
            chain.append(f"{owner}/{len(chain)}".encode())
            self.ledger.register(self.owned[owner][len(chain) - 1], chain[-1])
            assert self.ledger.shared(self.owned[owner][len(chain) - 1])

    @precondition(lambda self: self.owned)
    @rule(data=st.data(), count=st.integers(1, 3))
    def extend(self, data: st.DataObject, count: int) -> None:
        owner, free = data.draw(st.sampled_from(sorted(self.owned))), self.ledger.free_pages
        if count > free:
            with pytest.raises(OutOfPagesError):
                self.ledger.extend(owner, count)
            return
        more = self.ledger.extend(owner, count)
        self.took(owner, self.owned[owner] + more, more)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def reserve_twice(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.owned)))
        with pytest.raises(ValueError, match="already"):
            self.ledger.reserve(owner, 0)

    @precondition(lambda self: self.owned)
    @rule(data=st.data(), forget=st.booleans())
    def free(self, data: st.DataObject, forget: bool) -> None:
        owner = data.draw(st.sampled_from(sorted(self.owned)))
        pages = self.owned.pop(owner)
        self.ledger.free(owner, forget=forget)
        if forget:
            assert not any(page in self.ledger._key_of for page in pages)

    @rule()
    def free_a_stranger(self) -> None:
        self.ledger.free("nobody")

    @invariant()
    def only_requests_share(self) -> None:
        counts = Counter(page for owned in self.owned.values() for page in owned)
        assert set(counts) <= set(range(1, TOTAL))
        assert NULL_PAGE not in counts
        assert [self.ledger._references[page] for page in range(TOTAL)] == [counts[page] for page in range(TOTAL)]
        for owner, pages in self.owned.items():
            assert len(set(pages)) == len(pages)
            if owner.startswith("pass:"):
                assert all(counts[page] == 1 and not self.ledger.shared(page) for page in pages)

    @invariant()
    def none_lost(self) -> None:
        held = {kind: {p for o, owned in self.owned.items() if o.startswith(kind) for p in owned} for kind in KINDS}
        assert self.ledger.total == TOTAL - 1
        assert self.ledger.free_pages == self.ledger.total - sum(map(len, held.values()))
        assert {kind: self.ledger.held_by(kind) for kind in KINDS} == {kind: len(held[kind]) for kind in KINDS}
        assert len(self.ledger._runs) + self.ledger.cached_pages == self.ledger.free_pages

    @invariant()
    def keys_name_pages_one_to_one(self) -> None:
        ledger = self.ledger
        assert {page: key for key, page in ledger._page_of.items()} == ledger._key_of
        assert set(ledger._cached) <= set(ledger._key_of)


Ledger.TestCase.settings = settings(max_examples=80, stateful_step_count=50)
TestLedger = Ledger.TestCase


def test_cached_pages_are_given_away_last_and_the_end_of_a_chain_first() -> None:
    ledger = PageLedger(9)
    old, young = ledger.reserve("request:1", 3), ledger.reserve("request:2", 3)
    for n, page in enumerate((*old, *young)):
        ledger.register(page, bytes([n]))
    ledger.free("request:1")
    ledger.free("request:2")
    assert ledger.free_pages == 8
    assert set(ledger.reserve("request:3", 2)) == {7, 8}, "pages without a content go first"
    ledger.reserve("request:4", 2)
    assert ledger.match([b"\0", b"\1", b"\2"]) == old[:1]
    assert ledger.match([b"\3", b"\4", b"\5"]) == young
    ledger.reserve("request:5", 1)
    assert ledger.match([b"\0"]) == ()


def test_a_page_that_came_back_into_use_is_the_youngest_again() -> None:
    ledger = PageLedger(4)
    for n in (1, 2):
        (page,) = ledger.reserve(f"request:{n}", 1)
        ledger.register(page, bytes([n]))
        ledger.free(f"request:{n}")
    ledger.reserve("request:3", 2, ledger.match([b"\1"]))
    ledger.free("request:3")
    ledger.reserve("request:4", 2)
    assert ledger.match([b"\1"])
    assert not ledger.match([b"\2"])


def test_sequences_stay_in_one_piece_while_they_grow_and_when_all_pages_are_cached() -> None:
    """Many rounds of 16 requests at once, each of four pages and then six, leave every page cached."""
    ledger, rounds = PageLedger(256), 6
    for n in range(rounds):
        names = [f"request:{n}-{i}" for i in range(16)]
        tables = {name: list(ledger.reserve(name, 4)) for name in names}
        for _ in range(2):
            for name in names:
                tables[name] += ledger.extend(name, 1)
        for i, (name, table) in enumerate(tables.items()):
            assert table == list(range(table[0], table[0] + 6)), f"round {n}"
            for at, page in enumerate(table):
                ledger.register(page, bytes([n, i, at]))
            ledger.free(name)
    assert ledger.cached_pages > 96, "the rounds before are still there in part"
    assert all(len(ledger.match([bytes([rounds - 1, i, at]) for at in range(6)])) == 6 for i in range(16))


runs = st.lists(st.tuples(st.booleans(), st.integers(1, 6), st.integers(0, 30)), max_size=60)


@given(runs)
def test_runs_hold_what_a_set_would(steps: list[tuple[bool, int, int]]) -> None:
    """And pages come in one run wherever there is one."""
    found, free, taken = FreeRuns(1, 31), set(range(1, 31)), []
    for take, count, after in steps:
        if take and count <= len(free):
            behind = set(range(after + 1, after + 1 + count)) <= free and after not in free
            one_run = any(set(range(p, p + count)) <= free for p in free)
            pages = found.take_at(after + 1, count) if behind else found.take(count)
            assert len(set(pages)) == count
            assert set(pages) <= free
            assert not behind or pages[0] == after + 1
            if one_run:
                assert pages == tuple(range(pages[0], pages[0] + count))
            free -= set(pages)
            taken += pages
        elif not take and taken:
            page = taken.pop(after % len(taken))
            found.give(page)
            free.add(page)
        assert len(found) == len(free)
    assert set(found.take(len(found))) == free


def test_a_thousand_requests_and_jobs_leave_no_page_behind(
    driver: Any, draw_tokens: Any, training: Any, start_job: Any, tmp_path: Path
) -> None:
    """Requests that finish or are cancelled while waiting, in prefill or in decode; jobs that are stopped anywhere."""
    d = driver(jitter_s=0.002, kv_cache_bytes=80 * 8192, max_requests=8)
    source, ledger = random.Random(0), d.engine.executor.ledger
    before, cancelled, jobs = ledger.free_pages, 0, 0
    names: list[str] = []
    for n in range(1000):
        names.append(f"r{n}")
        prompt = draw_tokens(n, source.choice((1, 5, 20, 100)))
        params = SamplingParams(source.choice((1, 2, 5)), ignore_eos=True)
        d.submit(AddRequest(names[-1], prompt, params, d.clock.now))
        if n % 25 == 0:
            if d.engine.jobs:
                d.submit(StopJob("job", str(tmp_path / "c") if source.random() < 0.5 else None))
            else:
                jobs += 1
                d.submit(start_job(), *training(steps=2))
        if source.random() < 0.3:
            d.submit(Cancel(source.choice(names[-12:])))
            cancelled += 1
        for _ in range(source.choice((0, 0, 1, 2))):
            d.step()
        held = ledger.held_by("request:") + ledger.held_by("pass:")
        assert ledger.free_pages + held == before
    d.run()
    assert d.failures == []
    assert jobs > 10
    assert cancelled > 200
    assert d.of(PassDone)
    for job in list(d.engine.jobs):
        d.submit(StopJob(job))
    d.run()
    assert ledger.free_pages == before
    assert not d.engine.requests.running
    assert not d.engine.executor.passes
