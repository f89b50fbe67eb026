"""A request may bring its own promise, and the scheduler sees that instead of the engine's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from coserve_engine.messages import AddRequest, RequestFailed, SamplingParams, TokenBatch


def request(name: str, tokens: tuple[int, ...], arrival_s: float, **promise: float) -> AddRequest:
    return AddRequest(name, tokens, SamplingParams(4, ignore_eos=True), arrival_s, **promise)


def test_deadlines_are_the_requests_own(driver: Any, draw_tokens: Callable[[int, int], tuple[int, ...]]) -> None:
    d = driver(ttft_s=1.0, tpot_s=0.2)
    d.submit(request("own", draw_tokens(1, 20), 0.5, ttft_s=3.0, tpot_s=0.05), request("ours", draw_tokens(2, 20), 0.5))
    d.engine.requests.admit(0.0)
    first = {s.slot: s for s in d.engine._view(1.0).sequences}
    assert (first[1].deadline, first[1].tpot_s) == (3.5, 0.05)
    assert (first[2].deadline, first[2].tpot_s) == (1.5, 0.2)
    while not d.of(TokenBatch):
        d.step()
    for token in d.one(TokenBatch).tokens:
        slot, gap_s = (1, 0.05) if token.request_id == "own" else (2, 0.2)
        (view,) = (s for s in d.engine._view(1.0).sequences if s.slot == slot)
        assert view.deadline == pytest.approx(token.emitted_s + gap_s)


@pytest.mark.parametrize(("name", "value"), [("ttft_s", 0.0), ("tpot_s", -1.0), ("tpot_s", float("nan"))])
def test_a_promise_that_is_none_is_refused(driver: Any, name: str, value: float) -> None:
    d = driver()
    d.submit(request("r", (3, 4), 0.0, **{name: value}))
    d.step()
    failed = d.one(RequestFailed)
    assert failed.code == "invalid_slo"
    assert name in failed.message and str(value) in failed.message
