"""How much longer finetuning may make an iteration, as it changes while a job runs."""

from __future__ import annotations

from typing import Any

import pytest

from coserve_engine.messages import (
    AddRequest,
    ForwardBackward,
    IterationDone,
    Pass,
    SamplingParams,
    SetSlowdown,
    TrainSeq,
)
from coserve_engine.scheduler.plan import Plan, View


@pytest.fixture
def busy(driver: Any, draw_tokens: Any, start_job: Any) -> Any:
    """A driver whose engine, told of 50 percent at its start, decodes and finetunes."""
    d = driver(jitter_s=1e-5, max_slowdown_percent=50.0)
    seqs = (TrainSeq(0, draw_tokens(1, 64), (0.01,) * 64),)
    d.submit(start_job("job"), *(ForwardBackward("job", n, Pass(n, "job", 0, n, seqs)) for n in range(1, 41)))
    d.submit(AddRequest("r", (5, 6), SamplingParams(200, ignore_eos=True), d.clock.now))
    return d


def test_a_change_counts_from_the_next_iteration_on(busy: Any) -> None:
    seen: list[float | None] = []
    decide = busy.engine._policy

    def spy(view: View, *others: Any) -> Plan:
        seen.append(view.max_slowdown)
        return decide(view, *others)  # type: ignore[no-any-return]

    busy.engine._policy = spy
    busy.step()
    for percent in (20, 0, 300, None):
        busy.submit(SetSlowdown(percent))
        busy.step()
    assert seen == [0.5, 0.2, 0.0, 3.0, 0.5], "without one it is the configuration's"


def test_none_at_all_stops_finetuning_while_a_request_decodes(busy: Any) -> None:
    def trained() -> float:
        events = [each for _ in range(20) for each in busy.step() if isinstance(each, IterationDone)]
        assert all(each.decode_tokens for each in events[2:])
        return sum(each.finetune_tokens + each.backward_tokens for each in events)

    busy.submit(SetSlowdown(10_000))
    assert trained() > 0
    busy.submit(SetSlowdown(0))
    assert trained() == 0
    busy.submit(SetSlowdown(10_000))
    assert trained() > 0
