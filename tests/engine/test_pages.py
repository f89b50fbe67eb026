"""No page of the cache has two owners, and none is lost."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
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
from coserve_engine.pages import NULL_PAGE, PageLedger

TOTAL = 20


class Ledger(RuleBasedStateMachine):
    """Reserve and free in any order, against a plain dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = PageLedger(TOTAL)
        self.owned: dict[str, tuple[int, ...]] = {}
        self.count = 0

    @rule(kind=st.sampled_from(("request:", "pass:")), count=st.integers(0, TOTAL))
    def reserve(self, kind: str, count: int) -> None:
        self.count += 1
        owner, free = f"{kind}{self.count}", self.ledger.free_pages
        if count > free:
            with pytest.raises(OutOfPagesError):
                self.ledger.reserve(owner, count)
            assert self.ledger.free_pages == free
            return
        self.owned[owner] = self.ledger.reserve(owner, count)
        assert len(self.owned[owner]) == count

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def reserve_twice(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.owned)))
        with pytest.raises(ValueError, match="already"):
            self.ledger.reserve(owner, 0)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.owned)))
        del self.owned[owner]
        self.ledger.free(owner)

    @rule()
    def free_a_stranger(self) -> None:
        self.ledger.free("nobody")

    @invariant()
    def each_page_once(self) -> None:
        pages = [page for owned in self.owned.values() for page in owned]
        assert len(set(pages)) == len(pages)
        assert set(pages) <= set(range(1, TOTAL))
        assert NULL_PAGE not in pages

    @invariant()
    def none_lost(self) -> None:
        assert self.ledger.total == TOTAL - 1
        assert self.ledger.free_pages == self.ledger.total - sum(len(owned) for owned in self.owned.values())
        for kind in ("request:", "pass:"):
            held = sum(len(pages) for owner, pages in self.owned.items() if owner.startswith(kind))
            assert self.ledger.held_by(kind) == held


Ledger.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLedger = Ledger.TestCase


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
