"""What one iteration does: decode always, prefill by deadline, finetuning in what is left.

A pure function of a View and a latency model. The gap between two tokens of a request is the rest of one iteration
(its backward units), the turnaround and the forward of the next, so both ends are held: a forward by the earliest
deadline, the units by leaving room for the next forward. No constant says how much is kept free: the bounds of the
latency model do, and the learnt reserve for what no plan foresees. Finetuning gets nothing in an iteration in which a
request waits for a place or a prompt does not fit whole: the budget shrinks in the very iteration after a burst begins.
"""

from __future__ import annotations

from math import inf

from coserve_engine.latency.cost import CostModel
from coserve_engine.latency.work import NO_WORK, ForwardWork, decode_work
from coserve_engine.scheduler import finetuning, prefill
from coserve_engine.scheduler.finetuning import Room
from coserve_engine.scheduler.plan import PassShape, PassView, Plan, SequenceView, Unit, View, decode_segments, split

IDLE_SHARE = 0.5
"""Share of the time to first token that a forward, and the units after it, may take when no request is here."""
CROWDED_SHARE = 0.24
"""Share of the gap, without its fixed part, that decode rows may need before finetuning waits. It makes requests stay
longer, so more decode at once when a burst of prompts comes, and those need what decode leaves."""
WAIT_SHARE = 0.125
"""Share of it that a request may wait for what runs when it comes to nobody: a backward unit, between which an
iteration stops for it, or the rest of a forward, which is dropped where that is longer."""
UNIT_SHARE = 0.25
"""Share of the gap that a unit may take where seconds alone bound it: a request that comes waits for its end."""


def decide(view: View, cost: CostModel, plan_id: int) -> Plan:
    """Plan one iteration. An empty plan has neither segments nor units."""
    decoding, prompts = split(view.sequences)
    segments = decode_segments(decoding)
    decode = decode_work([s.done for s in decoding], view.tile, view.reaches) if decoding else NO_WORK
    left_s = min([s.deadline for s in decoding], default=inf) - view.now
    chunks, serving, whole, due_s = prefill.chunks_in_time(prompts, view, cost, decode, left_s)
    segments += chunks
    work, units_s = serving, 0.0
    units: tuple[Unit, ...] = ()
    if whole and view.waiting == 0 and view.passes and not _crowded(view, cost, decoding, decode):
        room = _forward_room(view, cost, serving, min(left_s - view.reserve_s, due_s))
        windows, work, passes = finetuning.windows(view, cost, work, room, at_least_one=not view.sequences)
        segments += windows
        units, units_s = _backward(view, cost, passes, forward=bool(windows))
    until_s = cost.forward_bound_s(work) + units_s
    return Plan(plan_id, tuple(segments), units, view.now + until_s, units_s, work, serving)


def _crowded(view: View, cost: CostModel, decoding: list[SequenceView], decode: ForwardWork) -> bool:
    """Whether decode rows, counted in `decode`, leave a prompt that may come too little of the gap: then they are
    better done soon.
    """
    if not decoding:
        return False
    gap_s = min([s.tpot_s for s in decoding])
    one_s = cost.forward_bound_s(decode_work([decoding[0].done], view.tile, view.reaches))
    return cost.forward_bound_s(decode) - one_s > CROWDED_SHARE * max(0.0, gap_s - one_s)


def _forward_room(view: View, cost: CostModel, serving: ForwardWork, due_s: float) -> Room:
    """What the forward may take with windows in it."""
    if not view.sequences:
        return Room(IDLE_SHARE * view.ttft_s, inf)
    expected_s = inf
    if view.max_slowdown is not None:
        passed_s = max((view.now - s.deadline + s.tpot_s for s in view.sequences if s.decoding), default=0.0)
        expected_s = (1 + view.max_slowdown) * cost.forward_s(serving) - max(0.0, passed_s)
    if serving.decode:
        return Room(due_s, expected_s)
    return Room(min(due_s, view.tpot_s), expected_s)


def _backward(
    view: View, cost: CostModel, passes: tuple[PassView, ...], *, forward: bool
) -> tuple[tuple[Unit, ...], float]:
    """The units, and the seconds that they may take after the forward, which gives each sequence a token; `forward`:
    whether it has windows.
    """
    longest_s = WAIT_SHARE * view.ttft_s
    if not view.sequences:
        budget_s = IDLE_SHARE * view.ttft_s
        units = finetuning.units(passes, cost, budget_s, longest_s)
        least = finetuning.first_unit(passes)
        if units or least is None or forward:
            return units, budget_s
        owner, unit = least  # or a job on a slow machine would never end
        return (unit,), 2 * cost.unit_bound_s(owner.shape.backward(*unit[1:]))
    decode = decode_work([s.known for s in view.sequences], view.tile, view.reaches)
    if cost.regime is not None:  # no number of tiles keeps units short there
        longest_s = min(longest_s, UNIT_SHARE * view.tpot_s)
    gap_s = min([s.tpot_s for s in view.sequences]) - view.reserve_s - cost.turnaround_s
    expected_s = inf
    if view.max_slowdown is not None:
        expected_s = (1 + view.max_slowdown) * cost.forward_s(decode) - cost.turnaround_s
    following = finetuning.next_windows(view, passes, cost, decode, Room(gap_s, expected_s))
    following_s = cost.forward_s(following)
    budget_s = min(gap_s - following_s * cost.forward_ratio, expected_s - following_s)
    return finetuning.units(passes, cost, budget_s, longest_s), max(0.0, budget_s)


def gives_way(plan: Plan, view: View, cost: CostModel, done: float) -> bool:
    """Whether the plan's forward, of which the share `done` is over, is to be dropped for a request that has just come:
    it serves nobody, and the rest would keep the request waiting too long. Its windows are planned again.
    """
    return not view.sequences and (1 - done) * cost.forward_s(plan.work) > WAIT_SHARE * view.ttft_s


def fitting_unit(unit: Unit, shape: PassShape, cost: CostModel, left_s: float) -> Unit | None:
    """A planned unit as it can run in the seconds that are left: itself, one of fewer tiles, or none."""
    for first in range(unit.first, unit.end):
        if cost.unit_bound_s(shape.backward(unit.layer, first, unit.end)) <= left_s:
            return unit if first == unit.first else unit._replace(first=first)
    return None
