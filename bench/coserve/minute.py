"""One minute of a simulated run, as its plot needs it."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate, pairwise

from coserve.study import stretched
from coserve_engine.latency.cost import CostModel
from coserve_engine.latency.work import ForwardWork
from coserve_engine.scheduler.plan import Plan, View
from coserve_engine.simulate.compare import Case
from coserve_engine.simulate.policies import policy_named
from coserve_engine.simulate.world import World

MINUTE_S = 60


@dataclass(frozen=True, slots=True)
class Minute:
    """Second by second: requests with a place, and finetuning in tokens a second; and every gap, where it ended."""

    policy: str
    seconds: list[float]
    requests: list[int]
    finetuning: list[float]
    gap_at_s: list[float]
    gaps_ms: list[float]


def minute(case: Case, name: str, begin_s: float) -> Minute:
    """Run the case for `begin_s` and a minute, and look at the minute."""
    setup = case.setup
    entry = policy_named(name, setup.tpot_s, lambda rows: setup.machine.forward_s(ForwardWork(prefill=rows)))
    looks: list[tuple[float, int, float]] = []

    def looking(view: View, cost: CostModel, plan_id: int) -> Plan:
        looks.append((view.now, len(view.sequences), world.finetuned_tokens))
        return entry.policy(view, cost, plan_id)

    world = World(setup, stretched(case), looking, finetuning=entry.finetuning, stops=entry.stops)
    result = world.run(begin_s + MINUTE_S + 1)
    marks = [begin_s + second for second in range(MINUTE_S + 1)]
    at = [looks[max(0, bisect_right(looks, (mark, 0, 0.0)) - 1)] for mark in marks]
    gaps = [
        (end_s - begin_s, 1e3 * gap_s)
        for times in result.requests
        for end_s, gap_s in zip(
            accumulate(times.gaps_s, initial=times.arrival_s + times.first_s), (0.0, *times.gaps_s), strict=True
        )
        if gap_s and begin_s <= end_s < begin_s + MINUTE_S
    ]
    return Minute(
        name,
        [mark - begin_s + 0.5 for mark in marks[:-1]],
        [requests for _, requests, _ in at[:-1]],
        [after - before for (_, _, before), (_, _, after) in pairwise(at)],
        [end_s for end_s, _ in gaps],
        [gap_ms for _, gap_ms in gaps],
    )
