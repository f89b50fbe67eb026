"""What other systems do, behind the interface the engine uses: (view, latency model, plan id) -> plan.

Written down from their papers and published code, and never below it: each serves as ours does alone, prompts cut by
deadline, which none of them does, and trains whenever nobody is served.
- temporal sharing: so many iterations of inference, then one whole training step (FlexLLM's baseline).
- Loquetier (its training loop): five decode steps, then one whole training step that shares a forward with serving.
- FlexLLM, its code: 256 rows of all kinds in an iteration, forward in windows, backward by whole layers of a sample.
- FlexLLM, its paper: forward and backward by tokens. Its budget is fixed, or as its f(c, s) <= SLO has it.
- LLMStation: training that pauses after each layer, at a rate that is fixed for a run.
"""

from __future__ import annotations

from dataclasses import replace
from math import inf

from coserve_engine.latency.cost import CostModel
from coserve_engine.latency.work import ForwardWork
from coserve_engine.scheduler import finetuning
from coserve_engine.scheduler.plan import (
    PassView,
    Plan,
    Policy,
    Segment,
    Unit,
    View,
    empty_plan,
    forward_work,
)
from coserve_engine.scheduler.schedule import decide

FLEXLLM_ROWS = 256
LOQUETIER_STEPS = 5


def serving_alone(view: View, cost: CostModel, plan_id: int) -> Plan:
    """No finetuning."""
    return decide(replace(view, passes=()) if view.passes else view, cost, plan_id)


def with_training(
    plan: Plan, view: View, cost: CostModel, segments: list[Segment], units: tuple[Unit, ...] = ()
) -> Plan:
    """The plan with these forward windows and units, which run whatever the clock says."""
    everything = (*plan.segments, *segments)
    return Plan(plan.id, everything, units, inf, inf, forward_work(everything, view), plan.serving)


def whole_units(owner: PassView, layers: int) -> tuple[Unit, ...]:
    """All that is left of the pass's next `layers` layers."""
    found: list[Unit] = []
    layer, end = owner.layer, owner.end_tile
    while layer >= 0 and len(found) < layers:
        found.append(Unit(owner.id, layer, 0, end))
        layer, end = layer - 1, len(owner.shape.tiles)
    return tuple(found)


def units_up_to(owner: PassView, tiles: int) -> tuple[Unit, ...]:
    """The pass's next units of `tiles` tiles in all, each as large as one gets."""
    units: list[Unit] = []
    layer, end = owner.layer, owner.end_tile
    while layer >= 0 and tiles > 0:
        first = max(0, end - min(tiles, finetuning.UNIT_TILES))
        units.append(Unit(owner.id, layer, first, end))
        tiles -= end - first
        layer, end = (layer, first) if first else (layer - 1, len(owner.shape.tiles))
    return tuple(units)


def window_up_to(owner: PassView, rows: int) -> list[Segment]:
    """The next tiles of the pass's forward in at most so many rows, as a window if there are any."""
    end = owner.fwd_tile
    while end < len(owner.shape.tiles) and owner.shape.tiles[end][0] <= rows:
        rows, end = rows - owner.shape.tiles[end][0], end + 1
    return [owner.shape.window(owner.fwd_tile, end)] if end > owner.fwd_tile else []


def waiting_and_ready(view: View) -> tuple[PassView | None, PassView | None]:
    """The first pass with forward to do, and the first that is ready for backward."""
    waiting = next((p for p in view.passes if not p.forward_done), None)
    return waiting, next((p for p in view.passes if p.forward_done), None)


def _training_step(view: View, cost: CostModel, plan: Plan) -> Plan:
    """The first pass from where it stands to its end, whole."""
    owner = view.passes[0]
    tiles = len(owner.shape.tiles)
    rest = [] if owner.forward_done else [owner.shape.window(owner.fwd_tile, tiles)]
    units = whole_units(owner._replace(fwd_tile=tiles), owner.shape.layers + 1)
    return with_training(plan, view, cost, rest, units)


def temporal(steps: int) -> Policy:
    """`steps` iterations of inference, then one whole training step without any."""

    def policy(view: View, cost: CostModel, plan_id: int) -> Plan:
        if view.passes and (not view.sequences or plan_id % (steps + 1) == steps):
            return _training_step(view, cost, empty_plan(plan_id, view.now))
        return serving_alone(view, cost, plan_id)

    return policy


def when_idle(view: View, cost: CostModel, plan_id: int) -> Plan:
    """A whole training step only where nobody is served: temporal sharing at its most careful."""
    if view.passes and not view.sequences and not view.waiting:
        return _training_step(view, cost, empty_plan(plan_id, view.now))
    return serving_alone(view, cost, plan_id)


def loquetier(steps: int) -> Policy:
    """`steps` steps of inference, then one with a whole training step in and after its forward."""

    def policy(view: View, cost: CostModel, plan_id: int) -> Plan:
        plan = serving_alone(view, cost, plan_id)
        if view.passes and (not view.sequences or plan_id % (steps + 1) == steps):
            return _training_step(view, cost, plan)
        return plan

    return policy


def _serving_within(view: View, cost: CostModel, plan_id: int, rows: int) -> Plan:
    """Serving as ours does alone, in at most `rows` rows."""
    return serving_alone(replace(view, max_batch_tokens=min(rows, view.max_batch_tokens)), cost, plan_id)


def fixed_budget(rows: int) -> Policy:
    """Decode, prompts, then forward windows up to `rows`; backward a whole layer of the first pass that is ready."""

    def policy(view: View, cost: CostModel, plan_id: int) -> Plan:
        serving = _serving_within(view, cost, plan_id, rows)
        waiting, ready = waiting_and_ready(view)
        segments = window_up_to(waiting, rows - serving.work.rows) if waiting else []
        return with_training(serving, view, cost, segments, whole_units(ready, 1) if ready else ())

    return policy


def token_budget(rows: int) -> Policy:
    """The same by tokens: what serving leaves of `rows` goes to a window, or to backward of as much work."""

    def policy(view: View, cost: CostModel, plan_id: int) -> Plan:
        serving = _serving_within(view, cost, plan_id, rows)
        return _by_tokens(serving, view, cost, rows - serving.work.rows)

    return policy


def latency_budget(percent: int) -> Policy:
    """By tokens, as many as keep the iteration's predicted time within `percent` of the time per output token: its
    paper's f(c, s) <= SLO, which its code lacks, by a latency model that learns online, which its paper lacks.
    """

    def policy(view: View, cost: CostModel, plan_id: int) -> Plan:
        serving, most_s = serving_alone(view, cost, plan_id), percent / 100 * view.tpot_s
        rows, beside = 0, serving.work
        while rows < view.max_batch_tokens:
            beside = beside.plus(ForwardWork(finetune=view.tile, calls=1, kv_rows=view.tile, pairs=view.tile**2))
            if cost.forward_s(beside) > most_s:
                break
            rows += view.tile
        return _by_tokens(serving, view, cost, rows)

    return policy


def _by_tokens(serving: Plan, view: View, cost: CostModel, rows: int) -> Plan:
    """`serving` with a window of at most `rows`, or backward of as much work: of a frozen model half a layer costs
    what a layer's forward does, so that a row of all layers is worth half of them.
    """
    waiting, ready = waiting_and_ready(view)
    if ready:
        tiles = max(0, rows) * ready.shape.layers // (2 * view.tile)
        return with_training(serving, view, cost, [], units_up_to(ready, tiles))
    return with_training(serving, view, cost, window_up_to(waiting, rows) if waiting else [])


def layer_pauses(iterations: int) -> Policy:
    """A layer of training in every so many iterations of inference, at a rate that nothing changes. A layer of forward
    is as many rows of all layers, beside those that are served.
    """

    def policy(view: View, cost: CostModel, plan_id: int) -> Plan:
        plan = serving_alone(view, cost, plan_id)
        if view.sequences and plan_id % iterations:
            return plan
        waiting, ready = waiting_and_ready(view)
        if ready:
            return with_training(plan, view, cost, [], whole_units(ready, 1))
        if waiting:
            rows = max(view.tile, waiting.shape.rows // waiting.shape.layers)
            return with_training(plan, view, cost, window_up_to(waiting, rows))
        return plan

    return policy
