"""Tokens leave the engine as soon as they are chosen, not after the backward units of their iteration."""

from __future__ import annotations

from typing import Any

import pytest

from coserve_engine.messages import AddRequest, Event, IterationDone, SamplingParams, TokenBatch


def late_tokens(d: Any, monkeypatch: pytest.MonkeyPatch, *, early: bool) -> tuple[int, int]:
    """Iterations with tokens and units, and how many of them gave out their tokens after a unit."""
    executor, log = d.engine.executor, []
    backward = executor.backward

    def spy(unit: Any) -> None:
        log.append("unit")
        backward(unit)

    def emit(events: list[Event]) -> None:
        log.extend(type(event).__name__ for event in events)

    monkeypatch.setattr(executor, "backward", spy)
    mixed = late = 0
    while not d.engine.idle:
        log.clear()
        emit(d.engine.step(emit=emit if early else None))
        assert log.count("TokenBatch") <= 1
        if "unit" in log and TokenBatch.__name__ in log:
            mixed += 1
            late += log.index("TokenBatch") > log.index("unit")
            assert log.index("IterationDone") > log.index("unit")
    return mixed, late


@pytest.mark.parametrize("early", (True, False))
def test_tokens_come_before_units(
    driver: Any, draw_tokens: Any, training: Any, start_job: Any, monkeypatch: pytest.MonkeyPatch, early: bool
) -> None:
    """Without somebody to take them they wait for the units: that is what a client would see as a gap."""
    d = driver(jitter_s=0.005)
    d.submit(start_job(), *training(steps=6))
    d.submit(AddRequest("r", draw_tokens(1, 30), SamplingParams(60, ignore_eos=True), d.clock.now))
    mixed, late = late_tokens(d, monkeypatch, early=early)
    assert mixed > 5
    assert late == (0 if early else mixed)


def test_nothing_is_given_out_twice(driver: Any, draw_tokens: Any, training: Any, start_job: Any) -> None:
    d = driver(jitter_s=0.005)
    d.submit(start_job(), *training(steps=3))
    d.submit(AddRequest("r", draw_tokens(1, 30), SamplingParams(40, ignore_eos=True), d.clock.now))
    found: list[Event] = []
    while not d.engine.idle:
        found += d.engine.step(emit=found.extend)
    assert sum(len(e.tokens) for e in found if isinstance(e, TokenBatch)) == 40
    assert len({e.started_s for e in found if isinstance(e, IterationDone)}) == len(
        [e for e in found if isinstance(e, IterationDone)]
    )
