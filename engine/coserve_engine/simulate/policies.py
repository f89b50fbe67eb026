"""Ways to decide, by name: ours, ours without one of its parts, and what others do (`peers`), each of any parameter."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf

from coserve_engine.latency.cost import CostModel
from coserve_engine.scheduler import finetuning, prefill
from coserve_engine.scheduler.finetuning import Room
from coserve_engine.scheduler.plan import Kind, Plan, Policy, Unit, View, forward_work, split
from coserve_engine.scheduler.schedule import IDLE_SHARE, decide
from coserve_engine.simulate import peers
from coserve_engine.simulate.errors import SimulationError
from coserve_engine.simulate.peers import serving_alone, units_up_to, waiting_and_ready, window_up_to, with_training


@dataclass(frozen=True, slots=True)
class Entry:
    """A policy and how to run it. `stops`: whether an arrival ends the units early; `share`: a static split's part of
    the machine for serving.
    """

    policy: Policy
    stops: bool = True
    finetuning: bool = True
    share: float | None = None


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
        waiting, ready = waiting_and_ready(view)
        if view.waiting or any(s.kind is Kind.PREFILL and not s.sample for s in serving.segments):
            return with_training(serving, view, cost, [])
        if waiting and (not ready or plan_id % 3 == 0):
            return with_training(serving, view, cost, window_up_to(waiting, free))
        units = units_up_to(ready, 4 * free // view.tile) if ready else ()
        return with_training(serving, view, cost, [], units)

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


def _peer(policy: Callable[..., Policy]) -> Callable[..., Entry]:
    return lambda *parameters: Entry(policy(*parameters), stops=False)


FORMS: dict[str, Callable[..., Entry]] = {
    "split N/N": _split,
    "temporal 1:N": _peer(peers.temporal),
    "N steps, 1 training": _peer(peers.loquetier),
    "fixed N rows": _peer(peers.fixed_budget),
    "fixed N tokens": _peer(peers.token_budget),
    "N % of the gap": _peer(peers.latency_budget),
    "a layer in N": _peer(peers.layer_pauses),
}
"""Policies of any ratio, budget or rate, by the form of their names: N is a whole number above zero."""


def named(tpot_s: float, cost: Callable[[int], float]) -> dict[str, Entry]:
    """Those of the table. `cost(rows)`: expected seconds of a forward, from which the budget of "no model" is made."""
    rows = 16
    while cost(rows + 16) < 0.8 * tpot_s:
        rows += 16
    others = (
        "split 50/50",
        "split 90/10",
        "temporal 1:64",
        "temporal 1:512",
        f"{peers.LOQUETIER_STEPS} steps, 1 training",
        f"fixed {peers.FLEXLLM_ROWS} rows",
        f"fixed {peers.FLEXLLM_ROWS} tokens",
        "a layer in 4",
    )
    return {
        "ours": Entry(decide),
        "serving alone": Entry(serving_alone, finetuning=False),
        **{name: _formed(name) for name in others},
        "training when idle": Entry(peers.when_idle, stops=False),
        "ours, no fusion": Entry(no_fusion),
        "ours, no stop": Entry(decide, stops=False),
        "ours, window 128": Entry(fixed_window(2)),
        "ours, no model": Entry(no_latency_model(rows), stops=False),
    }


def _formed(name: str) -> Entry:
    for form, made in FORMS.items():
        found = re.fullmatch(re.escape(form).replace("N", r"([1-9]\d*)"), name)
        if found:
            return made(*map(int, found.groups()))
    raise KeyError(name)


def policy_named(name: str, tpot_s: float, cost: Callable[[int], float]) -> Entry:
    """One of `named`, or of FORMS. Raises SimulationError: there is none of that name."""
    entries = named(tpot_s, cost)
    if name in entries:
        return entries[name]
    try:
        return _formed(name)
    except KeyError:
        known = f"{list(entries)}, and of any whole N {list(FORMS)}"
        raise SimulationError(f"--policies names {name!r}; there are {known}") from None
