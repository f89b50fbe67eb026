"""What one iteration does: decode always, prefill to keep the time to first token, finetuning in what is left.

A pure function of a View and a latency model. The gap between two tokens of a request is the rest of one iteration
(its backward units) and the forward of the next, so both are held: the forward by the earliest deadline, the units
by leaving room for the next forward. Finetuning gets nothing in an iteration in which a request waits for a place or
a prompt does not fit whole: the budget shrinks in the very iteration after a burst begins.
"""

from __future__ import annotations

from coserve_engine.cost import CostModel, ForwardWork, UnitWork
from coserve_engine.plan import Kind, PassView, Plan, Segment, SequenceView, Unit, View

FINETUNE_PACE = 0.6
"""Share of the time per output token that an iteration with finetuning aims to fill."""
PREFILL_PACE = 0.85
"""The same for an iteration with a prefill chunk."""
FORWARD_SHARE = 0.4
"""Share of finetuning's time that forward windows may take; backward costs about twice as much."""
MIN_CHUNK = 16
UNIT_TILES = 4
MAX_UNITS = 256


def sequence_work(kind: Kind, start: int, length: int, tile: int) -> ForwardWork:
    """Cost features of rows [start, start + length) of a sequence."""
    calls = kv_rows = pairs = 0
    position, end = start, start + length
    while position < end:
        tile_end = (position // tile + 1) * tile
        count = min(end, tile_end) - position
        calls, kv_rows, pairs = calls + 1, kv_rows + tile_end, pairs + max(count, 4) * tile_end
        position += count
    decode, prefill = (length, 0) if kind is Kind.DECODE else (0, length)
    return ForwardWork(decode=decode, prefill=prefill, calls=calls, kv_rows=kv_rows, pairs=pairs)


def tile_work(view: PassView, tile: int) -> ForwardWork:
    """Cost features of one tile of a pass in forward."""
    rows, kv = view.tiles[tile]
    return ForwardWork(finetune=rows, calls=1, kv_rows=kv, pairs=rows * kv)


def unit_work(view: PassView, layer: int, first: int, end: int) -> UnitWork:
    """Cost features of a unit."""
    tiles = view.tiles[first:end]
    head = layer == view.layers
    return UnitWork(head, sum(r for r, _ in tiles), len(tiles), 0 if head else sum(r * kv for r, kv in tiles))


def forward_work(segments: tuple[Segment, ...], view: View) -> ForwardWork:
    """Cost features of a whole plan's forward."""
    total = ForwardWork()
    passes = {p.id: p for p in view.passes}
    for segment in segments:
        if segment.kind is not Kind.FINETUNE:
            total = total.plus(sequence_work(segment.kind, segment.start, segment.length, view.tile))
            continue
        owner = passes[segment.slot]
        for tile, start in enumerate(owner.starts):
            if segment.start <= start < segment.start + segment.length:
                total = total.plus(tile_work(owner, tile))
    return total


def decide(view: View, cost: CostModel, plan_id: int) -> Plan:
    """Plan one iteration. An empty plan has neither segments nor units."""
    segments, work = _decode(view)
    decoding = bool(segments)
    left = min((s.deadline for s in view.sequences if s.decoding), default=0.0) - view.now
    prefill_left = left - (1 - PREFILL_PACE) * view.tpot_s if decoding else view.ttft_s
    chunks, work, whole = _prefill(view, cost, work, prefill_left)
    segments += chunks
    quantum = FINETUNE_PACE * (view.tpot_s if view.sequences else min(view.tpot_s, view.ttft_s / 4))
    units: tuple[Unit, ...] = ()
    until = view.now
    if whole and view.waiting == 0:
        finetune_left = left - (1 - FINETUNE_PACE) * view.tpot_s if decoding else quantum * FORWARD_SHARE
        windows, work = _windows(view, cost, work, finetune_left)
        segments += windows
        forward_bound = cost.forward_bound_s(work)
        next_forward = _next_forward_s(view, cost, segments) + (
            FORWARD_SHARE * quantum if _forward_waits(view) else 0.0
        )
        budget = max(0.0, quantum - next_forward)
        units = _units(view, cost, segments, forward_bound - cost.forward_s(work) + budget)
        if not view.sequences:
            units, budget = _at_least_one(view, cost, units, budget)
        until = view.now + forward_bound + budget
    return Plan(plan_id, tuple(segments), units, until, cost.forward_s(work))


def _decode(view: View) -> tuple[list[Segment], ForwardWork]:
    segments, work = [], ForwardWork()
    for sequence in view.sequences:
        if sequence.decoding:
            segments.append(Segment(Kind.DECODE, sequence.slot, sequence.done, 1, sample=True))
            work = work.plus(sequence_work(Kind.DECODE, sequence.done, 1, view.tile))
    return segments, work


def _prefill(
    view: View, cost: CostModel, work: ForwardWork, time_left: float
) -> tuple[list[Segment], ForwardWork, bool]:
    """Chunks by deadline; the third value says that every prompt's rest is planned whole."""
    segments: list[Segment] = []
    room = view.max_batch_tokens - work.decode
    prompts = sorted((s for s in view.sequences if not s.decoding), key=lambda s: (s.arrival, s.slot))
    for sequence in prompts:
        rest = sequence.known - sequence.done
        length = min(rest, room)
        while length > MIN_CHUNK and not _fits(cost, work, sequence, length, view.tile, time_left):
            length = max(MIN_CHUNK, length // 2)
        if length <= 0 or (segments and not _fits(cost, work, sequence, length, view.tile, time_left)):
            return segments, work, False
        segments.append(Segment(Kind.PREFILL, sequence.slot, sequence.done, length, sample=length == rest))
        work = work.plus(sequence_work(Kind.PREFILL, sequence.done, length, view.tile))
        room -= length
        if length < rest:
            return segments, work, False
    return segments, work, True


def _fits(cost: CostModel, work: ForwardWork, sequence: SequenceView, length: int, tile: int, time_left: float) -> bool:
    more = work.plus(sequence_work(Kind.PREFILL, sequence.done, length, tile))
    return cost.forward_bound_s(more) <= time_left


def _windows(view: View, cost: CostModel, work: ForwardWork, time_left: float) -> tuple[list[Segment], ForwardWork]:
    """Forward windows of live passes, oldest first, tile by tile while they fit."""
    segments: list[Segment] = []
    for owner in view.passes:
        tile = owner.fwd_tile
        while tile < len(owner.tiles):
            more = work.plus(tile_work(owner, tile))
            rows = more.decode + more.prefill + more.finetune
            fits = rows <= view.max_batch_tokens and cost.forward_bound_s(more) <= time_left
            if not fits and (view.sequences or not work.empty):
                break
            work, tile = more, tile + 1
        if tile > owner.fwd_tile:
            start = owner.starts[owner.fwd_tile]
            end = owner.starts[tile - 1] + owner.tiles[tile - 1][0]
            segments.append(Segment(Kind.FINETUNE, owner.id, start, end - start))
        if tile < len(owner.tiles):
            break
    return segments, work


def _forward_waits(view: View) -> bool:
    return any(p.fwd_tile < len(p.tiles) for p in view.passes)


def _next_forward_s(view: View, cost: CostModel, segments: list[Segment]) -> float:
    """Bound on the next forward's decode rows: those that decode now and those whose prompt ends in this iteration."""
    work = ForwardWork()
    for segment in segments:
        if segment.sample:
            work = work.plus(sequence_work(Kind.DECODE, segment.start + segment.length, 1, view.tile))
    return cost.forward_bound_s(work)


def _units(view: View, cost: CostModel, segments: list[Segment], budget_s: float) -> tuple[Unit, ...]:
    """Backward units in order, oldest pass first, until their predicted time passes the budget."""
    planned = {s.slot: s.start + s.length for s in segments if s.kind is Kind.FINETUNE}
    units: list[Unit] = []
    for owner in view.passes:
        last_row = owner.starts[-1] + owner.tiles[-1][0]
        if owner.fwd_tile < len(owner.tiles) and planned.get(owner.id) != last_row:
            break
        layer, end = owner.layer, owner.end_tile
        stop_layer = 0 if owner.training else owner.layers
        while layer >= stop_layer and len(units) < MAX_UNITS:
            first = max(0, end - UNIT_TILES)
            while first < end - 1 and cost.unit_bound_s(unit_work(owner, layer, first, end)) > budget_s:
                first += 1
            seconds = cost.unit_bound_s(unit_work(owner, layer, first, end))
            if seconds > budget_s:
                return tuple(units)
            units.append(Unit(owner.id, layer, first, end))
            budget_s -= seconds
            layer, end = (layer, first) if first > 0 else (layer - 1, len(owner.tiles))
    return tuple(units)


def _at_least_one(
    view: View, cost: CostModel, units: tuple[Unit, ...], budget_s: float
) -> tuple[tuple[Unit, ...], float]:
    """Nobody waits for a token: a unit that is longer than the budget runs all the same, or the job would never end."""
    ready = [p for p in view.passes if p.fwd_tile == len(p.tiles)]
    if units or not ready:
        return units, budget_s
    owner = ready[0]
    first = owner.end_tile - 1
    seconds = cost.unit_bound_s(unit_work(owner, owner.layer, first, owner.end_tile))
    return (Unit(owner.id, owner.layer, first, owner.end_tile),), max(budget_s, 2 * seconds)
