"""Other ways to decide, behind the interface the engine uses: (view, latency model, plan id) -> plan.

What other systems do is written down from their published code: the fixed budget is FlexLLM's (256 rows of all kinds in
an iteration, backward by whole layers), the loop is Loquetier's (five decode steps, then one whole training step).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf

from coserve_engine.latency.cost import CostModel
from coserve_engine.scheduler import finetuning, prefill
from coserve_engine.scheduler.finetuning import Room
from coserve_engine.scheduler.plan import (
    Kind,
    PassView,
    Plan,
    Policy,
    Segment,
    Unit,
    View,
    empty_plan,
    forward_work,
    split,
)
from coserve_engine.scheduler.schedule import IDLE_SHARE, decide
from coserve_engine.simulate.errors import SimulationError

FLEXLLM_ROWS = 256
LOQUETIER_STEPS = 5


@dataclass(frozen=True, slots=True)
class Entry:
    """A policy and how to run it. `stops`: whether an arrival ends the units early; `share`: a static split's part of
    the machine for serving.
    """

    policy: Policy
    stops: bool = True
    finetuning: bool = True
    share: float | None = None


def serving_alone(view: View, cost: CostModel, plan_id: int) -> Plan:
    """No finetuning."""
    return decide(replace(view, passes=()) if view.passes else view, cost, plan_id)


def _with(plan: Plan, view: View, cost: CostModel, segments: list[Segment], units: tuple[Unit, ...]) -> Plan:
    """The plan with these forward windows and units, which run whatever the clock says."""
    everything = (*plan.segments, *segments)
    work = forward_work(everything, view)
    return Plan(plan.id, everything, units, inf, inf, work, plan.serving)


def _whole_units(owner: PassView, layers: int) -> tuple[Unit, ...]:
    """All that is left of the pass's next `layers` layers."""
    found: list[Unit] = []
    layer, end = owner.layer, owner.end_tile
    while layer >= 0 and len(found) < layers:
        found.append(Unit(owner.id, layer, 0, end))
        layer, end = layer - 1, len(owner.shape.tiles)
    return tuple(found)


def _window_up_to(owner: PassView, rows: int) -> list[Segment]:
    """The next tiles of the pass's forward in at most so many rows, as a window if there are any."""
    end = owner.fwd_tile
    while end < len(owner.shape.tiles) and owner.shape.tiles[end][0] <= rows:
        rows, end = rows - owner.shape.tiles[end][0], end + 1
    return [owner.shape.window(owner.fwd_tile, end)] if end > owner.fwd_tile else []


def _training_step(view: View, cost: CostModel, plan: Plan) -> Plan:
    """The first pass from where it stands to its end, whole."""
    owner = view.passes[0]
    tiles = len(owner.shape.tiles)
    rest = [] if owner.forward_done else [owner.shape.window(owner.fwd_tile, tiles)]
    return _with(plan, view, cost, rest, _whole_units(owner._replace(fwd_tile=tiles), owner.shape.layers + 1))


def temporal(steps: int) -> Policy:
    """`steps` iterations of inference, then one whole training step without any."""

    def policy(view: View, cost: CostModel, plan_id: int) -> Plan:
        if view.passes and (not view.sequences or plan_id % (steps + 1) == steps):
            return _training_step(view, cost, empty_plan(plan_id, view.now))
        return serving_alone(view, cost, plan_id)

    return policy


def loquetier(view: View, cost: CostModel, plan_id: int) -> Plan:
    """Five steps of inference, then one with a whole training step in and after its forward."""
    plan = serving_alone(view, cost, plan_id)
    if view.passes and (not view.sequences or plan_id % (LOQUETIER_STEPS + 1) == LOQUETIER_STEPS):
        return _training_step(view, cost, plan)
    return plan


def fixed_budget(rows: int) -> Policy:
    """Decode, prompts, then forward windows up to `rows`; backward a whole layer of the first pass that is ready."""

    def policy(view: View, cost: CostModel, plan_id: int) -> Plan:
        serving = _serving_up_to(view, cost, plan_id, rows)
        waiting = next((p for p in view.passes if not p.forward_done), None)
        segments = _window_up_to(waiting, rows - serving.work.rows) if waiting else []
        ready = next((p for p in view.passes if p.forward_done), None)
        return _with(serving, view, cost, segments, _whole_units(ready, 1) if ready else ())

    return policy


def _serving_up_to(view: View, cost: CostModel, plan_id: int, rows: int) -> Plan:
    """Decode rows, and prompts in order of deadline up to `rows` in all, whatever time they take."""
    decoding, prompts = split(view.sequences)
    plan = serving_alone(replace(view, sequences=tuple(decoding)), cost, plan_id)
    limited = replace(view, max_batch_tokens=rows)
    chunks, work, _, _ = prefill.chunks(prompts, limited, cost, plan.work, inf)
    return replace(plan, segments=(*plan.segments, *chunks), work=work, serving=work)


def no_latency_model(rows: int) -> Policy:
    """Ours without predictions: what is left of a fixed budget of `rows`, chosen from averages, goes to windows and to
    four layer-rows of backward for each row, in turns.
    """

    def policy(view: View, cost: CostModel, plan_id: int) -> Plan:
        serving = _serving_up_to(view, cost, plan_id, rows)
        free = max(0, rows - serving.work.rows)
        waiting = next((p for p in view.passes if not p.forward_done), None)
        ready = next((p for p in view.passes if p.forward_done), None)
        if view.waiting or any(s.kind is Kind.PREFILL and not s.sample for s in serving.segments):
            return _with(serving, view, cost, [], ())
        if waiting and (not ready or plan_id % 3 == 0):
            return _with(serving, view, cost, _window_up_to(waiting, free), ())
        units: list[Unit] = []
        if ready:
            layer, end, tiles = ready.layer, ready.end_tile, 4 * free // view.tile
            while layer >= 0 and tiles > 0:
                first = max(0, end - min(tiles, finetuning.UNIT_TILES))
                units.append(Unit(ready.id, layer, first, end))
                tiles -= end - first
                layer, end = (layer, first) if first else (layer - 1, len(ready.shape.tiles))
        return _with(serving, view, cost, [], tuple(units))

    return policy


def fixed_window(tiles: int) -> Policy:
    """Ours with windows and units of `tiles` tiles only."""

    def policy(view: View, cost: CostModel, plan_id: int) -> Plan:
        plan = decide(view, cost, plan_id)
        shapes = {p.id: p for p in view.passes}
        segments, after = [s for s in plan.segments if s.kind is not Kind.FINETUNE], dict(shapes)
        for segment in plan.segments:
            if segment.kind is Kind.FINETUNE:
                owner = shapes[segment.slot]
                last = len(owner.shape.tiles)
                end = owner.shape.tiles_of(segment)[1]
                if end != last:
                    end = owner.fwd_tile + (end - owner.fwd_tile) // tiles * tiles
                if end > owner.fwd_tile:
                    segments.append(owner.shape.window(owner.fwd_tile, end))
                    after[owner.id] = owner._replace(fwd_tile=end)
        units: list[Unit] = []
        left_s = plan.units_s if plan.units else 0.0
        for owner in after.values():
            layer, end = owner.layer, owner.end_tile
            while owner.forward_done and layer >= 0:
                first = max(0, end - tiles)
                work = owner.shape.backward(layer, first, end)
                if cost.unit_bound_s(work) > left_s:
                    break
                units.append(Unit(owner.id, layer, first, end))
                left_s -= cost.unit_s(work)
                layer, end = (layer, first) if first else (layer - 1, len(owner.shape.tiles))
        forward = forward_work(segments, view)
        return replace(plan, segments=tuple(segments), units=tuple(units), work=forward)

    return policy


def no_fusion(view: View, cost: CostModel, plan_id: int) -> Plan:
    """Ours with forward windows in forwards of their own, between two of serving."""
    ready = tuple(p for p in view.passes if p.forward_done)
    waiting = tuple(p for p in view.passes if not p.forward_done)
    plan = decide(replace(view, passes=ready), cost, plan_id)
    if not waiting or view.waiting or plan.serving.prefill:
        return plan
    due_s = min((s.deadline for s in view.sequences), default=inf) - view.now
    room = Room(min(due_s, IDLE_SHARE * view.ttft_s) - cost.forward_bound_s(plan.serving), inf)
    windows, work, _ = finetuning.windows(
        replace(view, passes=waiting), cost, forward_work((), view), room, at_least_one=not view.sequences
    )
    if windows:
        bound_s = cost.forward_bound_s(work)
        return Plan(plan_id, tuple(windows), (), view.now + bound_s, 0.0, work, work._replace(finetune=0))
    # No unit in this iteration where a forward is due: it will find its room in the next.
    if plan_id % 2 and view.sequences:
        return replace(plan, units=())
    return plan


def _split(serving: int, training: int) -> Entry:
    return Entry(serving_alone, finetuning=False, share=serving / (serving + training))


def _temporal(steps: int) -> Entry:
    return Entry(temporal(steps), stops=False)


def _fixed(rows: int) -> Entry:
    return Entry(fixed_budget(rows), stops=False)


def named(tpot_s: float, cost: Callable[[int], float]) -> dict[str, Entry]:
    """All policies. `cost(rows)`: expected seconds of a forward, from which the budget of "no model" is made."""
    rows = 16
    while cost(rows + 16) < 0.8 * tpot_s:
        rows += 16
    return {
        "ours": Entry(decide),
        "serving alone": Entry(serving_alone, finetuning=False),
        "split 50/50": _split(50, 50),
        "split 90/10": _split(90, 10),
        "temporal 1:64": _temporal(64),
        "temporal 1:512": _temporal(512),
        "fixed 256 rows": _fixed(FLEXLLM_ROWS),
        "5 steps, 1 training": Entry(loquetier, stops=False),
        "ours, no fusion": Entry(no_fusion),
        "ours, no stop": Entry(decide, stops=False),
        "ours, window 128": Entry(fixed_window(2)),
        "ours, no model": Entry(no_latency_model(rows), stops=False),
    }


SCALED: dict[str, Callable[..., Entry]] = {
    r"temporal 1:([1-9]\d*)": _temporal,
    r"split ([1-9]\d*)/([1-9]\d*)": _split,
    r"fixed ([1-9]\d*) rows": _fixed,
}
"""Policies of any ratio or budget, by the form of their names."""


def policy_named(name: str, tpot_s: float, cost: Callable[[int], float]) -> Entry:
    """One of `named`, or of SCALED. Raises SimulationError: there is none of that name."""
    entries = named(tpot_s, cost)
    if name in entries:
        return entries[name]
    for form, made in SCALED.items():
        found = re.fullmatch(form, name)
        if found:
            return made(*map(int, found.groups()))
    raise SimulationError(
        f"--policies names {name!r}; there are {list(entries)}, and 'temporal 1:N', 'split A/B' and 'fixed N rows'"
    )
