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
from coserve_engine.latency.work import NO_WORK, ForwardWork, decode_work, prefill_work
from coserve_engine.scheduler import finetuning, prefill
from coserve_engine.scheduler.finetuning import Room
from coserve_engine.scheduler.plan import PassView, Plan, Segment, SequenceView, Unit, View, decode_segments, split

IDLE_SHARE = 0.5
"""Share of the time to first token that a forward, and the units after it, may take when no request is here."""
CROWDED_SHARE = 0.24
"""Share of the gap, without its fixed part, that decode rows may need before finetuning waits. It makes requests stay
longer, so more decode at once when a burst of prompts comes, and those need what decode leaves."""
CROWDED_KNEE_SHARE = 0.5
"""The same where a device has a knee: decode rows take little of the rows that fill it."""
WAIT_SHARE = 0.125
"""Share of it that a request may wait for what runs when it comes to nobody: a backward unit, between which an
iteration stops for it, or the rest of a forward, which is dropped where that is longer."""
UNIT_SHARE = 0.15
"""Share of the gap that a unit may take where seconds alone bound it: a request that comes waits for its end."""


def decide(view: View, cost: CostModel, plan_id: int) -> Plan:
    """Plan one iteration. An empty plan has neither segments nor units."""
    decoding, prompts = split(view.sequences)
    segments = decode_segments(decoding)
    decode = decode_work([s.done for s in decoding], view.tile, view.reaches) if decoding else NO_WORK
    left_s = min([s.deadline for s in decoding], default=inf) - view.now
    finetunes = view.waiting == 0 and bool(view.passes) and not _crowded(view, cost, decoding, decode)
    windows, beside, passes = _before_prompts(view, cost, prompts, decode, left_s) if finetunes else ([], decode, ())
    chunks, work, whole, due_s = prefill.chunks_in_time(prompts, view, cost, beside, left_s)
    serving = work.less(beside).plus(decode) if windows else work
    rest = prefill.after(prompts, chunks) if not whole else []
    units_s = 0.0
    units: tuple[Unit, ...] = ()
    if finetunes and (whole or prefill.patient(rest, view, cost, decode)):
        if not windows:
            room = _forward_room(view, cost, serving, min(left_s - view.reserve_s, due_s))
            windows, work, passes = finetuning.windows(view, cost, work, room, at_least_one=not view.sequences)
        units, units_s = _backward(view, cost, passes, rest, forward=bool(windows))
    until_s = cost.forward_bound_s(work) + units_s
    return Plan(plan_id, (*segments, *chunks, *windows), units, view.now + until_s, units_s, work, serving)


def _before_prompts(
    view: View, cost: CostModel, prompts: list[SequenceView], decode: ForwardWork, left_s: float
) -> tuple[list[Segment], ForwardWork, tuple[PassView, ...]]:
    """Windows that go before prompts, the counts of the forward with them, and the passes after them: where prompts can
    wait and units would soon have no pass. The most urgent gets some rows all the same, and prompts fill what windows
    leave, to the row.
    """
    if not prompts or not prefill.patient(prompts, view, cost, decode) or not finetuning.due(view, cost, decode):
        return [], decode, view.passes
    first = prefill.by_urgency(prompts, view)[0]
    some = prefill_work(first.done, min(first.known - first.done, prefill.CUT), view.tile, view.reaches)
    room = _forward_room(view, cost, decode, left_s - view.reserve_s)
    windows, work, passes = finetuning.windows(view, cost, decode.plus(some), room, at_least_one=False)
    return windows, work.less(some), passes


def _crowded(view: View, cost: CostModel, decoding: list[SequenceView], decode: ForwardWork) -> bool:
    """Whether decode rows, counted in `decode`, leave a prompt that may come too little of the gap: then they are
    better done soon.
    """
    if not decoding:
        return False
    gap_s = min([s.tpot_s for s in decoding])
    one_s = cost.forward_bound_s(decode_work([decoding[0].done], view.tile, view.reaches))
    share = CROWDED_SHARE if cost.regime is None else CROWDED_KNEE_SHARE
    return cost.forward_bound_s(decode) - one_s > share * max(0.0, gap_s - one_s)


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
    view: View, cost: CostModel, passes: tuple[PassView, ...], rest: list[SequenceView], *, forward: bool
) -> tuple[tuple[Unit, ...], float]:
    """The units, and the seconds that they may take after the forward, which gives each sequence a token; `rest`: of
    the prompts, what the next forward goes on with; `forward`: whether this one has windows.
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
    if rest:
        decode = prefill.chunks(rest, view, cost, decode, gap_s).work
    following = finetuning.next_windows(view, passes, cost, decode, Room(gap_s, expected_s))
    following_s = cost.forward_s(following)
    budget_s = min(gap_s - following_s * cost.forward_ratio, expected_s - following_s)
    return finetuning.units(passes, cost, budget_s, longest_s), max(0.0, budget_s)


def gives_way(plan: Plan, view: View, cost: CostModel, done: float) -> bool:
    """Whether the plan's forward, of which the share `done` is over, is to be dropped for a request that has just come:
    it serves nobody, and the rest would keep the request waiting too long. Its windows are planned again.
    """
    return not view.sequences and (1 - done) * cost.forward_s(plan.work) > WAIT_SHARE * view.ttft_s
