"""Requests that outgrow the pool: whoever is put out is computed again, says the same, and leaks nothing."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from coserve_engine.config import EngineConfig
from coserve_engine.device.cpu import CpuDevice
from coserve_engine.errors import OutOfPagesError
from coserve_engine.messages import AddRequest, Cancel, PassDone, RequestFailed, SamplingParams, StopJob
from coserve_engine.numerics import Numerics
from coserve_engine.scheduler.pages import PageLedger
from coserve_engine.serving.requests import RequestTable
from coserve_engine.serving.serving import Serving
from coserve_engine.tensors.counts import TokenCounts

PAGE_BYTES = 8192
TINY = {"kv_cache_bytes": 20 * PAGE_BYTES, "max_model_length": 256, "numerics": Numerics(page=16)}
"""19 pages of 16 tokens: one request of full length, or several for a while."""


def assert_sound(table: RequestTable, ledger: PageLedger, passes: dict[str, tuple[int, ...]]) -> None:
    """Every page is where its owners say, and nowhere else."""
    counts = Counter(page for request in table.running.values() for page in set(request.pages))
    in_passes = Counter(page for pages in passes.values() for page in pages)
    assert not set(counts) & set(in_passes)
    assert all(count == 1 for count in in_passes.values())
    assert [ledger._references[page] for page in range(ledger.total + 1)] == [
        (counts + in_passes)[page] for page in range(ledger.total + 1)
    ]
    assert set(table._computing.values()) <= set(table.running), "nobody waits for a page that will not come"
    assert ledger.held_by("request:") == len(counts)
    assert ledger.held_by("pass:") == len(in_passes)
    assert ledger.free_pages == ledger.total - len(counts) - len(in_passes)
    assert not any(request.pages or request.done for request in table.waiting)
    assert [*table.running, *(r.slot for r in table.waiting)] == sorted(
        [*table.running, *(r.slot for r in table.waiting)]
    ), "who came first is served first"


def move_about(seed: int, moves: int) -> Counter[str]:
    """Adds, cancels, tokens, finishes, preemptions and passes that come and are dropped, without a model.

    Returns how often each happened.
    """
    source, passes = random.Random(seed), dict[str, tuple[int, ...]]()
    config = EngineConfig("", max_model_length=256, max_requests=12, max_waiting=10, numerics=Numerics(page=16))
    ledger = PageLedger(26)
    executor: Any = SimpleNamespace(
        config=config,
        model=SimpleNamespace(vocab_size=4, eos_token_ids=(3,)),
        ledger=ledger,
        counts=TokenCounts(4, CpuDevice(torch.device("cpu"))),
        numerics=config.numerics,
    )
    serving = Serving(executor, {})
    table, seen = serving.requests, Counter[str]()

    def drop_pass() -> bool:
        if not passes:
            return False
        ledger.free(passes.popitem()[0])
        seen["dropped"] += 1
        return True

    for n in range(moves):
        match source.choice(("add", *["step"] * 8, "cancel", "pass", "end pass")):
            case "add":
                prompt = (*[n % 3] * source.choice((0, 16, 48)), *(source.randrange(3) for _ in range(20)))
                length, endless = source.choice((2, 10, 150)), source.random() < 0.9
                params = SamplingParams(length, ignore_eos=endless, frequency_penalty=0.5 * (n % 2))
                seen["added"] += 1
                seen["refused"] += len(serving.add(AddRequest(f"r{n}", prompt, params, float(n)), 0.0))
            case "cancel":
                alive = [r.command.request_id for r in (*table.waiting, *table.running.values())]
                if alive and source.random() < 0.3:
                    serving.cancel(source.choice(alive))
                    seen["cancelled"] += 1
            case "pass":
                try:
                    passes[f"pass:{n}"] = ledger.reserve(f"pass:{n}", source.randint(1, 6))
                except OutOfPagesError:
                    seen["no pass"] += 1
            case "end pass":
                if passes and source.random() < 0.3:
                    name = source.choice(sorted(passes))
                    del passes[name]
                    ledger.free(name)
            case "step":
                serving.make_room(drop_pass, float(n))
                for request in list(table.running.values()):
                    rest = len(request.tokens) - request.done
                    rows = rest if source.random() < 0.8 else source.randint(1, rest)
                    assert config.numerics.pages(request.done + rows) <= len(request.pages), "rows have a place"
                    computed = table.launched(request, request.done + rows, 0 if rows == rest else None, 0.0)
                    table.advance(request, computed.end)
                    if rows == rest and table.emit(computed, source.randrange(4), 0.0):
                        seen["finished"] += 1
        assert_sound(table, ledger, passes)
    seen["preempted"], seen["hits"] = table.preemptions, table.prefix_hits
    for request in [*table.waiting, *table.running.values()]:
        serving.cancel(request.command.request_id)
    while drop_pass():
        pass
    assert_sound(table, ledger, {})
    assert ledger.free_pages == ledger.total
    assert sorted(executor.counts._free) == list(range(len(executor.counts.seen)))
    ledger.reserve("request:0", ledger.total)
    return seen


def test_ten_thousand_adds_cancels_and_completions_leak_no_page() -> None:
    seen = move_about(0, 65_000)
    assert seen["added"] + seen["cancelled"] + seen["finished"] >= 10_000
    assert min(seen[name] for name in ("dropped", "refused", "cancelled", "no pass", "finished", "preempted")) > 30
    assert seen["hits"] > 1000


def leak_a_page(self: PageLedger, owner: str, *, forget: bool = False) -> None:
    if len(self._holdings[owner].pages) > 3:
        self._holdings[owner].pages.pop()
    FREE(self, owner, forget=forget)


def free_what_is_shared(self: PageLedger, owner: str, *, forget: bool = False) -> None:
    for page in self._holdings[owner].pages:
        self._references[page] = 1
    FREE(self, owner, forget=forget)


FREE = PageLedger.free


@pytest.mark.parametrize("broken", (leak_a_page, free_what_is_shared))
def test_a_ledger_that_is_wrong_is_noticed(broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PageLedger, "free", broken)
    with pytest.raises(AssertionError):
        move_about(0, 2000)


# ---- with a model ----


def orders(draw_tokens: Any, seed: int, count: int = 8) -> list[AddRequest]:
    """Requests that begin alike or not, greedy or sampled, with every processor."""
    source, made = random.Random(seed), []
    for n in range(count):
        prompt = (*draw_tokens(n % 2, source.choice((0, 32, 48))), *draw_tokens(100 + n, source.randint(1, 60)))
        params = SamplingParams(
            source.randint(30, 110), temperature=n % 2 * 0.9, seed=n, ignore_eos=True, top_k=n % 3 * 20
        )
        if n % 4 == 1:
            params = replace(params, repetition_penalty=1.3, frequency_penalty=0.2, min_tokens=1, logprobs=2)
        made.append(AddRequest(f"r{n}", prompt, params, 0.0))
    return made


def outputs(driver: Any, order: list[AddRequest]) -> dict[str, list[int]]:
    """Each alone in a large pool."""
    found = {}
    for one in order:
        d = driver()
        d.submit(one)
        found |= d.run().tokens()
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tuning", (False, True))
def test_outputs_in_a_tiny_pool_are_those_of_each_alone(
    driver: Any, draw_tokens: Any, training: Any, start_job: Any, seed: int, tuning: bool
) -> None:
    order, source = orders(draw_tokens, seed, 16 if tuning else 8), random.Random(seed)
    d = driver(jitter_s=0.003, seed=seed, **TINY | ({"kv_cache_bytes": 32 * PAGE_BYTES} if tuning else {}))
    if tuning:
        d.submit(start_job(), *training(steps=2, seed=seed))
    for one in order:
        d.submit(replace(one, arrival_s=d.clock.now))
        for _ in range(source.randint(0, 6)):
            d.step(lambda: source.random() < 0.2)
            assert_sound(d.engine.requests, d.engine.executor.ledger, held_by_passes(d))
    d.run()
    assert d.engine.requests.preemptions > 0
    assert d.failures == []
    assert d.tokens() == outputs(driver, order)
    assert d.engine.executor.ledger.free_pages == d.engine.executor.ledger.total
    if tuning:
        assert len(d.of(PassDone)) == 4


def held_by_passes(d: Any) -> dict[str, tuple[int, ...]]:
    passes = d.engine.executor.passes
    return {str(n): tuple(p for table in state.layout.tables for p in table) for n, state in passes.items()}


def test_keeping_the_old_keys_and_values_in_other_pages_breaks_it(
    driver: Any, draw_tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken: a request that was put out goes on as if its new pages held what the old ones did."""
    order = orders(draw_tokens, 0)
    start = RequestTable._start

    def as_if_computed(self: RequestTable, request: Any, hits: Any, now_s: float) -> None:
        start(self, request, hits, now_s)
        if request.last_emit_s is not None:
            request.done = len(request.tokens) - 1

    monkeypatch.setattr(RequestTable, "_start", as_if_computed)
    d = driver(jitter_s=0.003, **TINY)
    for one in order:
        d.submit(one)
    d.run()
    assert d.engine.requests.preemptions > 0
    assert d.tokens() != outputs(driver, order)


def test_the_oldest_always_goes_on(driver: Any, draw_tokens: Any) -> None:
    """Two that each need nearly the whole pool: the first is never put out, the second only while it must."""
    d = driver(**TINY)
    params = SamplingParams(200, ignore_eos=True)
    for n in range(2):
        d.submit(AddRequest(f"r{n}", draw_tokens(n, 50), params, 0.0))
    while len(d.tokens().get("r0", ())) < 200:
        assert 1 in d.engine.requests.running or not d.events
        d.step()
    d.run()
    assert len(d.tokens()["r1"]) == 200
    assert d.engine.requests.preemptions == 1


@pytest.mark.parametrize("steps", (0, 1, 40, 140))
def test_a_cancelled_request_frees_all_in_every_state(driver: Any, draw_tokens: Any, steps: int) -> None:
    """Waiting, in prefill, in decode, put out."""
    d = driver(max_batch_tokens=64, **TINY)
    d.submit(AddRequest("old", draw_tokens(1, 100), SamplingParams(150, ignore_eos=True), 0.0))
    d.step()
    d.submit(AddRequest("young", draw_tokens(2, 100), SamplingParams(100, ignore_eos=True), 0.0))
    for _ in range(steps):
        d.step()
    table = d.engine.requests
    state = "waiting" if table.waiting else "running"
    assert state == {0: "waiting", 1: "running", 40: "running", 140: "waiting"}[steps]
    assert bool(table.preemptions) is (steps == 140)
    d.submit(Cancel("young"))
    assert not table.waiting
    (old,) = table.running.values()
    assert d.engine.executor.ledger.held_by("request:") == len(old.pages)
    seen = len(d.tokens().get("young", ()))
    d.run()
    assert len(d.tokens().get("young", ())) == seen
    assert d.engine.executor.ledger.free_pages == d.engine.executor.ledger.total


def test_a_request_takes_pages_as_it_grows(driver: Any, draw_tokens: Any) -> None:
    d = driver(numerics=Numerics(page=16))
    d.submit(AddRequest("r", draw_tokens(1, 20), SamplingParams(200, ignore_eos=True), 0.0))
    held = []
    while not d.engine.idle:
        d.step()
        held.append(d.engine.executor.ledger.held_by("request:"))
    assert held[0] == 2
    assert held == [*sorted(held[:-1]), 0]
    assert max(held) == 14


def test_a_pass_is_dropped_before_a_request_is_put_out(
    driver: Any, draw_tokens: Any, training: Any, start_job: Any
) -> None:
    d = driver(jitter_s=0.02, **TINY)
    d.submit(start_job(), *training(steps=1))
    d.step(lambda: True)
    assert d.engine.executor.passes
    d.submit(AddRequest("r", draw_tokens(1, 30), SamplingParams(200, ignore_eos=True), d.clock.now))
    d.run()
    assert d.engine.requests.preemptions == 0
    assert len(d.tokens()["r"]) == 200
    d.submit(StopJob("job"))
    d.run()
    assert d.engine.executor.ledger.free_pages == d.engine.executor.ledger.total


def test_more_waiting_requests_than_allowed_are_refused(driver: Any) -> None:
    d = driver(max_requests=1, max_waiting=2)
    for n in range(5):
        d.submit(AddRequest(f"r{n}", (5, 6), SamplingParams(3, ignore_eos=True), 0.0))
        if n == 0:
            d.step()
    failed = d.of(RequestFailed) + [e for e in d.step() if isinstance(e, RequestFailed)]
    assert {e.request_id for e in d.of(RequestFailed)} == {"r3", "r4"}
    assert {e.code for e in failed} == {"overloaded"}
    assert "2 requests are waiting" in d.of(RequestFailed)[0].message
    assert set(d.run().tokens()) == {"r0", "r1", "r2"}
