"""How finetuning fills what an iteration has left: forward windows beside the serving rows, backward units after them.

Between two tokens of a request lie the units of one iteration and the forward of the next. Units end by a clock, so
only the forward's error eats into the gap; what an iteration leaves unused is not idle, the next one only begins
earlier. Windows and units share the time as the live passes need them: the rest of their forward against the rest of
their backward, so that one pass is ready for backward when the one before it is done.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from coserve_engine.cost import CostModel
from coserve_engine.plan import PassShape, PassView, Segment, Unit, View
from coserve_engine.work import ForwardWork

UNIT_TILES = 8
"""Longer units gain little, and a request that comes waits for the end of one."""
MAX_UNITS = 256


class Room(NamedTuple):
    """What a forward may take: `bound_s` in all but a few cases, `expected_s` by prediction."""

    bound_s: float
    expected_s: float

    def holds(self, work: ForwardWork, cost: CostModel) -> bool:
        return cost.forward_bound_s(work) <= self.bound_s and cost.forward_s(work) <= self.expected_s


def windows(
    view: View, cost: CostModel, work: ForwardWork, room: Room, *, at_least_one: bool
) -> tuple[list[Segment], ForwardWork, tuple[PassView, ...]]:
    """Forward windows of live passes in order, tile by tile while they fit, and where the passes stand after them.

    With `at_least_one` a tile that does not fit runs all the same if the forward has no other row.
    """
    segments: list[Segment] = []
    after = list(view.passes)
    for number, owner in enumerate(view.passes):
        tile, count = owner.fwd_tile, len(owner.shape.tiles)
        while tile < count:
            more = work.plus(owner.shape.forward(tile, tile + 1))
            fits = more.rows <= view.max_batch_tokens and room.holds(more, cost)
            if not fits and not (at_least_one and work.empty):
                break
            work, tile = more, tile + 1
        if tile > owner.fwd_tile:
            segments.append(owner.shape.window(owner.fwd_tile, tile))
            after[number] = owner._replace(fwd_tile=tile)
        if tile < count:
            break
    return segments, work, tuple(after)


def next_windows(
    passes: tuple[PassView, ...], cost: CostModel, decode: ForwardWork, room: Room, max_rows: int
) -> ForwardWork:
    """The next forward: its decode rows, and as many tiles of windows as the passes need beside backward units.

    Args:
        passes: as they stand after this iteration's forward.
        decode: the next forward's decode rows.
        room: what units and the next forward may take together.
    """
    waiting = [p for p in passes if not p.forward_done]
    backward_s = sum(_backward_s(p, cost) for p in passes if p.forward_done)
    if not waiting or backward_s <= 0:
        return decode
    base_s = cost.forward_s(decode)
    forward_s = sum(
        cost.forward_s(decode.plus(p.shape.forward(p.fwd_tile, len(p.shape.tiles)))) - base_s for p in waiting
    )
    free_s = min(room.bound_s - cost.forward_bound_s(decode), room.expected_s - cost.forward_s(decode))
    wanted_s = max(0.0, free_s) * forward_s / (forward_s + backward_s)
    work, shape, tile = decode, waiting[0].shape, waiting[0].fwd_tile
    while tile < len(shape.tiles):
        more = work.plus(shape.forward(tile, tile + 1))
        tile_s = cost.forward_s(more) - cost.forward_s(work)
        if wanted_s < tile_s / 2 or more.rows > max_rows or not room.holds(more, cost):
            break
        work, tile, wanted_s = more, tile + 1, wanted_s - tile_s
    return work


def _backward_s(owner: PassView, cost: CostModel) -> float:
    """Seconds that the rest of a pass's backward is expected to take, in units as large as they get."""
    shape, tiles = owner.shape, len(owner.shape.tiles)

    def layer_s(layer: int, end: int) -> float:
        units = math.ceil(end / UNIT_TILES)
        return units * cost.unit_s(shape.backward(layer, 0, max(1, end // units)))

    rest_s = layer_s(owner.layer, owner.end_tile) if owner.layer >= owner.last_layer else 0.0
    below = owner.layer - owner.last_layer
    return rest_s + below * layer_s(0, tiles) if below > 0 else rest_s


def units(passes: tuple[PassView, ...], cost: CostModel, budget_s: float, longest_s: float) -> tuple[Unit, ...]:
    """Backward units in order, as large as fit: what those before are expected to take and the bound of the last one
    stay within the budget; none but a unit of one tile is longer than `longest_s`.
    """
    planned: list[Unit] = []
    for owner in passes:
        if not owner.forward_done:
            continue
        layer, end = owner.layer, owner.end_tile
        while layer >= owner.last_layer and len(planned) < MAX_UNITS:
            first = largest_unit(owner.shape, cost, layer, end, budget_s, longest_s)
            if first is None:
                return tuple(planned)
            planned.append(Unit(owner.shape.id, layer, first, end))
            budget_s -= cost.unit_s(owner.shape.backward(layer, first, end))
            layer, end = (layer, first) if first > 0 else (layer - 1, len(owner.shape.tiles))
    return tuple(planned)


def largest_unit(
    shape: PassShape, cost: CostModel, layer: int, end: int, budget_s: float, longest_s: float
) -> int | None:
    """The first tile of the largest unit that ends at tile `end` and has its bound within the budget, if any has."""
    found = None
    for first in range(end - 1, max(-1, end - 1 - UNIT_TILES), -1):
        bound_s = cost.unit_bound_s(shape.backward(layer, first, end))
        if bound_s > budget_s or (bound_s > longest_s and found is not None):
            break
        found = first
    return found


def first_unit(passes: tuple[PassView, ...]) -> tuple[PassView, Unit] | None:
    """The shortest unit with which backward can go on."""
    for owner in passes:
        if owner.forward_done and owner.layer >= owner.last_layer:
            return owner, Unit(owner.shape.id, owner.layer, owner.end_tile - 1, owner.end_tile)
    return None
