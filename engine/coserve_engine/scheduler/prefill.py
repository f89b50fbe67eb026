"""Which rows of which prompts an iteration computes: earliest deadline first, never past a deadline of those that
decode.
"""

from __future__ import annotations

from math import inf
from typing import NamedTuple

from coserve_engine.latency.cost import CostModel
from coserve_engine.latency.work import ForwardWork, prefill_work
from coserve_engine.scheduler.plan import Kind, Segment, SequenceView, View, full_rows

CUT = 16
"""Where a prompt is cut: at a multiple of so many positions."""
STEPS = (1.0, 0.75, 0.5, 0.25)
"""Shares of the reserve that stay free beside prompts, tried in this order."""
HURRY_SHARE = 0.9
"""Of the time until then, what prompts may need before they take more of the reserve."""
PATIENT_SHARE = 0.5
"""Of the time that prompts have, what they may need at most to bear finetuning beside them."""
PATIENCE = 4.0
"""A request counts as due after so many times the time to first token, however late the deadline it asked for."""


def urgency(sequence: SequenceView, ttft_s: float) -> tuple[float, float, int]:
    """Sorts prompts: by deadline, but none waits for others for ever."""
    return min(sequence.deadline, sequence.arrival + PATIENCE * ttft_s), sequence.arrival, sequence.slot


def by_urgency(prompts: list[SequenceView], view: View) -> list[SequenceView]:
    """In the order in which they are computed."""
    return sorted(prompts, key=lambda s: urgency(s, view.ttft_s))


class Chunks(NamedTuple):
    """What a forward computes of prompts.

    Args:
        work: the counts of the forward.
        whole: whether every prompt is planned to its end.
        due_s: seconds until the earliest deadline of a prompt that is (infinite if none).
    """

    segments: list[Segment]
    work: ForwardWork
    whole: bool
    due_s: float


def chunks_in_time(
    prompts: list[SequenceView], view: View, cost: CostModel, decode: ForwardWork, left_s: float
) -> Chunks:
    """`chunks` beside the rows of `decode`, which are due in `left_s`, that leave as much of the view's reserve free as
    lets every prompt be in time, if this iteration's pace holds.
    """
    if not prompts or view.reserve_s == 0 or left_s == inf:
        return chunks(prompts, view, cost, decode, left_s - view.reserve_s)
    prompts = by_urgency(prompts, view)
    for share in STEPS:
        found = chunks(prompts, view, cost, decode, left_s - share * view.reserve_s)
        seconds = cost.forward_s(found.work) + cost.median_turnaround_s
        if found.whole or _in_time(prompts, view, found.work.rows - decode.rows, seconds):
            return found
    return chunks(prompts, view, cost, decode, left_s)


def _in_time(prompts: list[SequenceView], view: View, rows: int, seconds: float) -> bool:
    """Whether prompts, in this order and so many rows in so many seconds, are done a reserve before their deadlines: a
    pause may hit them as well.
    """
    needed = 0
    for sequence in prompts:
        needed += sequence.known - sequence.done
        if needed * seconds > rows * HURRY_SHARE * (sequence.deadline - view.now - view.reserve_s):
            return False
    return True


def chunks(prompts: list[SequenceView], view: View, cost: CostModel, work: ForwardWork, left_s: float) -> Chunks:
    """Chunks of `prompts`, those of the view, beside `work`, in a forward that may take `left_s` (bound; infinite if
    nobody decodes).

    A prompt is cut where it does not fit. One whose deadline passed a time to first token ago gets `CUT` rows in every
    iteration, whatever it delays, so that nobody waits for ever.
    """
    segments: list[Segment] = []
    due_s = inf
    for sequence in by_urgency(prompts, view):
        rest = sequence.known - sequence.done
        room = view.max_batch_tokens - work.rows
        overdue = view.now > sequence.deadline + view.ttft_s
        length = _fitting(sequence, cost, work, min(rest, room), min(left_s, due_s), view)
        length = _filling(length, cost, work, view)
        if length < min(rest, CUT) and (overdue and not segments):
            length = max(length, min(rest, room, CUT))
        if length <= 0:
            return Chunks(segments, work, False, due_s)
        segments.append(Segment(Kind.PREFILL, sequence.slot, sequence.done, length, sample=length == rest))
        work = work.plus(prefill_work(sequence.done, length, view.tile, view.reaches))
        if length < rest:
            return Chunks(segments, work, False, due_s)
        if sequence.deadline > view.now + cost.forward_bound_s(work):
            due_s = min(due_s, sequence.deadline - view.now)
    return Chunks(segments, work, True, due_s)


def _filling(length: int, cost: CostModel, work: ForwardWork, view: View) -> int:
    """Of a prompt's next `length` rows, those with which forwards fill the device: what is a little longer would take a
    wave of tiles for its last rows, and these help to fill the next forward instead. Such a cut lies at any position.
    """
    if cost.regime is None:
        return length
    rows, full = work.rows + length, full_rows(view, cost)
    if rows <= full:
        return length
    most = rows // full * full - work.rows
    return most if most >= CUT else length


def _fitting(sequence: SequenceView, cost: CostModel, work: ForwardWork, most: int, left_s: float, view: View) -> int:
    """The most rows, at most `most`, that fit; a cut lies at a multiple of CUT positions."""

    def fits(length: int) -> bool:
        more = prefill_work(sequence.done, length, view.tile, view.reaches)
        return cost.forward_bound_s(work.plus(more)) <= left_s

    if most <= 0:
        return 0
    whole = sequence.known - sequence.done
    if most == whole and fits(most):
        return most
    low, high = sequence.done // CUT, (sequence.done + most) // CUT
    if fits(high * CUT - sequence.done):
        return max(0, high * CUT - sequence.done)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * CUT - sequence.done) else (low, middle)
    return max(0, low * CUT - sequence.done)


def after(prompts: list[SequenceView], chunks: list[Segment]) -> list[SequenceView]:
    """What is left of `prompts` after `chunks`."""
    ends = {segment.slot: segment.start + segment.length for segment in chunks}
    moved = [sequence._replace(done=ends.get(sequence.slot, sequence.done)) for sequence in prompts]
    return [sequence for sequence in moved if sequence.done < sequence.known]


def patient(prompts: list[SequenceView], view: View, cost: CostModel, decode: ForwardWork) -> bool:
    """Whether prompts bear finetuning beside them although they do not fit into one forward: filled forwards, one a
    gap, are through with each in a part of the time that it has. Never where a row costs the same in any company: there
    a forward that ends early is no loss.
    """
    if cost.regime is None:
        return False
    each = full_rows(view, cost) - decode.rows
    if each <= 0:
        return False
    rows, gap_s = 0, min([s.tpot_s for s in view.sequences], default=view.tpot_s)
    for sequence in by_urgency(prompts, view):
        rows += sequence.known - sequence.done
        if rows / each * gap_s > PATIENT_SHARE * (sequence.deadline - view.now):
            return False
    return True
