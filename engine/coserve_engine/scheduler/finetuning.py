"""How finetuning fills what an iteration has left: forward windows beside the serving rows, backward units after them.

Between two tokens of a request lie the units of one iteration and the forward of the next. Units end by a clock, so
only the forward's error eats into the gap; what an iteration leaves unused is not idle, the next one only begins
earlier. Windows and units share the time as the live passes need them: the rest of their forward against the rest of
their backward, so that one pass is ready for backward when the one before it is done.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from typing import NamedTuple

from coserve_engine.latency.cost import CostModel
from coserve_engine.latency.regimes import Regime
from coserve_engine.latency.work import ForwardWork
from coserve_engine.scheduler.plan import PassShape, PassView, Segment, Unit, View, full_rows

UNIT_TILES = 8
"""Longer units gain little where a row costs the same in any company; elsewhere seconds alone bound them."""
MAX_UNITS = 256
HARDLY = 1.05
"""So many times as long is hardly longer, for another step of rows."""


class Room(NamedTuple):
    """What a forward may take: `bound_s` in all but a few cases, `expected_s` by prediction."""

    bound_s: float
    expected_s: float

    def holds(self, forward_s: float, ratio: float) -> bool:
        """Whether it has room for a forward of so many expected seconds, where the bound is `ratio` times as many."""
        bound_s, expected_s = self
        return forward_s * ratio <= bound_s and forward_s <= expected_s


def windows(
    view: View, cost: CostModel, work: ForwardWork, room: Room, *, at_least_one: bool
) -> tuple[list[Segment], ForwardWork, tuple[PassView, ...]]:
    """Forward windows of live passes in order, as many tiles as fit, and where the passes stand after them.

    With `at_least_one` a tile that does not fit runs all the same if the forward has no other row.
    """
    segments: list[Segment] = []
    after = list(view.passes)
    rows = _window_rows(view, view.passes, cost, work, _gap_s(view))
    for number, owner in enumerate(view.passes):
        if owner.forward_done:
            continue
        shape, first, last = owner.shape, owner.fwd_tile, len(owner.shape.tiles)
        end = _most_tiles(shape, first, last, rows, cost, work, room)
        if end == first and at_least_one and work.empty:
            end = first + 1
        if end > first:
            work = work.plus(shape.forward(first, end))
            segments.append(shape.window(first, end))
            after[number] = owner._replace(fwd_tile=end)
        if end < last:
            break
    return segments, work, tuple(after)


def due(view: View, cost: CostModel, work: ForwardWork) -> bool:
    """Whether windows are to fill the forward that holds `work`, lest backward of the next pass wait for them; to be
    asked only where the latency model has a knee.
    """
    most = min(full_rows(view, cost), view.window_limit)
    waiting = [p for p in view.passes if not p.forward_done]
    return bool(waiting) and _window_rows(view, view.passes, cost, work, _gap_s(view)) == most


def _gap_s(view: View) -> float:
    return min([s.tpot_s for s in view.sequences], default=0.0) - view.reserve_s


def _most_tiles(
    shape: PassShape, first: int, last: int, max_rows: int, cost: CostModel, work: ForwardWork, room: Room
) -> int:
    """Where the largest window from tile `first`, up to `last`, ends that fits beside `work`."""
    ratio = cost.forward_ratio

    def too_many(end: int) -> bool:
        more = work.plus(shape.forward(first, end))
        return more.rows > max_rows or not room.holds(cost.forward_s(more), ratio)

    return first + bisect_left(range(first + 1, last + 1), True, key=too_many)


def _window_rows(view: View, passes: tuple[PassView, ...], cost: CostModel, work: ForwardWork, gap_s: float) -> int:
    """Rows up to which windows go into the forward of `work`, of a gap of so many seconds.

    Where a device has a knee, a forward is filled with windows or takes those alone that cost nothing: two half filled
    would launch, and read, more for as many rows. One that holds prompts is filled, others as late as lets the forward
    of the next pass end with the backward of this one.
    """
    regime = cost.regime
    if regime is None or not view.sequences:
        return view.window_limit
    full = full_rows(view, cost)
    free, each = _free_rows(work, cost, regime), full - work.rows
    waiting, ready = [p for p in passes if not p.forward_done], [p for p in passes if p.forward_done]
    if not waiting or each < regime.step:
        return min(free, view.window_limit)
    if work.prefill:
        return min(full, view.window_limit)
    shape, first = waiting[0].shape, waiting[0].fwd_tile
    end = max(first + 1, bisect_right(shape.starts, shape.starts[first] + each) - 1)
    rows = sum([p.shape.rows - p.shape.starts[p.fwd_tile] for p in waiting])
    spare_s = gap_s - cost.forward_s(work.plus(shape.forward(first, end)))
    filled = sum([_backward_s(p, cost) for p in ready]) <= math.ceil(rows / each) * max(0.0, spare_s)
    return min(full if filled else free, view.window_limit)


def _free_rows(work: ForwardWork, cost: CostModel, regime: Regime) -> int:
    """Up to how many rows the forward of `work` is predicted to take hardly longer: the knee alone is too vague."""
    rows = max(regime.step, regime.launched(work.rows))
    taken_s = cost.forward_s(work._replace(prefill=work.prefill + rows - work.rows))
    while rows + regime.step <= regime.knee:
        more_s = cost.forward_s(work._replace(prefill=work.prefill + rows + regime.step - work.rows))
        if more_s > HARDLY * taken_s:
            break
        rows, taken_s = rows + regime.step, more_s
    return rows


def next_windows(
    view: View, passes: tuple[PassView, ...], cost: CostModel, decode: ForwardWork, room: Room
) -> ForwardWork:
    """The next forward: its decode rows, and as many tiles of windows as the passes need beside backward units.

    Args:
        passes: as they stand after this iteration's forward.
        decode: the next forward's decode rows.
        room: what units and the next forward may take together.
    """
    waiting = [p for p in passes if not p.forward_done]
    if not waiting or len(waiting) == len(passes):
        return decode
    max_rows = _window_rows(view, passes, cost, decode, room.bound_s)
    if cost.regime is not None:
        shape, first = waiting[0].shape, waiting[0].fwd_tile
        end = _most_tiles(shape, first, len(shape.tiles), max_rows, cost, decode, room)
        return decode.plus(shape.forward(first, end)) if end > first else decode
    backward_s = sum([_backward_s(p, cost) for p in passes if p.forward_done])
    if backward_s <= 0:
        return decode
    base_s, ratio = cost.forward_s(decode), cost.forward_ratio
    forward_s = sum(
        [cost.forward_s(decode.plus(p.shape.forward(p.fwd_tile, len(p.shape.tiles)))) - base_s for p in waiting]
    )
    free_s = min(room.bound_s - base_s * ratio, room.expected_s - base_s)
    wanted_s = max(0.0, free_s) * forward_s / (forward_s + backward_s)
    work, work_s, shape, first = decode, base_s, waiting[0].shape, waiting[0].fwd_tile
    for end in range(first + 1, len(shape.tiles) + 1):
        more = decode.plus(shape.forward(first, end))
        more_s = cost.forward_s(more)
        if wanted_s < (more_s - work_s) / 2 or more.rows > max_rows or not room.holds(more_s, ratio):
            break
        work, work_s, wanted_s = more, more_s, wanted_s - (more_s - work_s)
    return work


def _backward_s(owner: PassView, cost: CostModel) -> float:
    """Seconds that the rest of a pass's backward is expected to take, in units as large as they get."""
    shape, tiles = owner.shape, len(owner.shape.tiles)

    def layer_s(layer: int, end: int) -> float:
        units = math.ceil(end / UNIT_TILES) if cost.regime is None else 1
        return units * cost.unit_s(shape.backward(layer, 0, max(1, end // units)))

    rest_s = layer_s(owner.layer, owner.end_tile) if owner.layer >= owner.last_layer else 0.0
    below = owner.layer - owner.last_layer
    return rest_s + below * layer_s(0, tiles) if below > 0 else rest_s


def units(passes: tuple[PassView, ...], cost: CostModel, budget_s: float, longest_s: float) -> tuple[Unit, ...]:
    """Backward units in order, as large as fit: what those before are expected to take and the bound of the last one
    stay within the budget; none but a unit of one tile is longer than `longest_s`. A pass whose next unit would not
    even fit alone lets the others go first.
    """
    planned: list[Unit] = []
    whole_s = budget_s
    for owner in passes:
        if not owner.forward_done:
            continue
        shape, layer, end, tiles = owner.shape, owner.layer, owner.end_tile, len(owner.shape.tiles)
        last_layer = owner.last_layer
        known: dict[tuple[int, int], tuple[int, float, float]] = {}
        while layer >= last_layer and len(planned) < MAX_UNITS:
            alike = shape.kinds[layer], end
            largest = known.get(alike)
            if largest is None or largest[1] > budget_s:
                largest = known[alike] = _largest_unit(shape, cost, layer, end, min(budget_s, longest_s))
            first, bound_s, expected_s = largest
            if bound_s > whole_s:
                break
            if bound_s > budget_s or (planned and first > 0 and end - first < min(end, _full_tiles(shape, cost))):
                return tuple(planned)
            planned.append(Unit(shape.id, layer, first, end))
            budget_s -= expected_s
            layer, end = (layer, first) if first > 0 else (layer - 1, tiles)
    return tuple(planned)


def _largest_unit(shape: PassShape, cost: CostModel, layer: int, end: int, limit_s: float) -> tuple[int, float, float]:
    """The first tile, bound and expected seconds of the largest unit that ends at tile `end` and has its bound within
    the limit; of one tile if none has.
    """
    ratio = cost.unit_ratio(head=layer == shape.layers)
    low, first = max(0, end - UNIT_TILES) if cost.regime is None else 0, end - 1
    expected_s = cost.unit_s(shape.backward(layer, first, end))
    if expected_s * ratio > limit_s:
        low = first
    while low < first:
        middle = (low + first) // 2
        longer_s = cost.unit_s(shape.backward(layer, middle, end))
        if longer_s * ratio <= limit_s:
            first, expected_s = middle, longer_s
        else:
            low = middle + 1
    tiles = _full_tiles(shape, cost)
    if first > 0 and end - first > tiles > 1:
        first = end - (end - first) // tiles * tiles
        expected_s = cost.unit_s(shape.backward(layer, first, end))
    return first, expected_s * ratio, expected_s


def _full_tiles(shape: PassShape, cost: CostModel) -> int:
    """Of how many tiles a unit is to be a multiple: as many as fill the device, or its last wave would be dear; one
    where it has no knee.
    """
    return 1 if cost.regime is None else max(1, cost.regime.full * len(shape.tiles) // shape.rows)


def fitting_unit(unit: Unit, shape: PassShape, cost: CostModel, left_s: float) -> Unit | None:
    """A planned unit as it can run in the seconds that are left: itself, one of fewer tiles, or none."""
    tiles = _full_tiles(shape, cost)
    for first in range(unit.first, unit.end):
        if first > unit.first and (unit.end - first) % tiles:
            continue
        if cost.unit_bound_s(shape.backward(unit.layer, first, unit.end)) <= left_s:
            return unit if first == unit.first else unit._replace(first=first)
    return None


def first_unit(passes: tuple[PassView, ...]) -> tuple[PassView, Unit] | None:
    """The shortest unit with which backward can go on."""
    for owner in passes:
        if owner.forward_done and owner.layer >= owner.last_layer:
            return owner, Unit(owner.shape.id, owner.layer, owner.end_tile - 1, owner.end_tile)
    return None
