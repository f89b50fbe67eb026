"""Each peer does what its paper or its code says, iteration by iteration."""

from __future__ import annotations

import pytest

from coserve_engine.latency.cost import CostModel
from coserve_engine.scheduler.plan import Kind, Plan, Policy, View
from coserve_engine.simulate import peers
from coserve_engine.simulate.errors import SimulationError
from coserve_engine.simulate.machine import CPU
from coserve_engine.simulate.policies import policy_named
from coserve_engine.simulate.setup import Setup
from coserve_engine.simulate.trace import Arrival, drawn
from coserve_engine.simulate.world import World

Seen = list[tuple[View, Plan]]
LAYERS, TILES = CPU.layers, 8
"""Of a pass of 512 rows."""


def seen(policy: Policy, arrivals: list[Arrival], seconds: float = 30.0) -> Seen:
    """Every view and plan of a run in which arrivals end nothing early."""
    found: Seen = []

    def looking(view: View, cost: CostModel, plan_id: int) -> Plan:
        plan = policy(view, cost, plan_id)
        found.append((view, plan))
        return plan

    World(Setup(CPU, tpot_s=0.2, noise=0.0), arrivals, looking, stops=False).run(seconds)
    return found


def rows(plan: Plan, *kinds: Kind) -> int:
    return sum(segment.length for segment in plan.segments if segment.kind in kinds)


def trains(plan: Plan) -> bool:
    return bool(plan.units) or rows(plan, Kind.FINETUNE) > 0


def whole_layers(plan: Plan) -> int:
    """Layers of backward, each of which must be whole."""
    assert all((unit.first, unit.end) == (0, TILES) for unit in plan.units)
    return len(plan.units)


BUSY = [Arrival(0.0, 40, 300)]
"""One who is served all the time."""
MANY = drawn(60, 3.0, 1.0, 100, 40, seed=1)


def test_temporal_sharing_never_mixes_and_takes_whole_steps() -> None:
    for number, (view, plan) in enumerate(seen(peers.temporal(4), BUSY)):
        assert not (trains(plan) and rows(plan, Kind.DECODE, Kind.PREFILL))
        if view.passes and view.sequences:
            assert trains(plan) == (number % 5 == 4)
        if trains(plan):
            assert rows(plan, Kind.FINETUNE) == 512 and whole_layers(plan) == LAYERS + 1


def test_training_when_idle_stalls_nobody_who_decodes() -> None:
    found = seen(peers.when_idle, MANY)
    assert all(trains(plan) == (not view.sequences) for view, plan in found if view.passes and not view.waiting)
    assert any(trains(plan) for _, plan in found)


def test_loquetier_trains_with_each_sixth_step_in_one_forward() -> None:
    mixed = 0
    for number, (view, plan) in enumerate(seen(peers.loquetier(peers.LOQUETIER_STEPS), BUSY)):
        if view.passes and view.sequences:
            assert trains(plan) == (number % 6 == 5)
            assert rows(plan, Kind.DECODE, Kind.PREFILL) > 0
            mixed += trains(plan)
    assert mixed > 5


@pytest.mark.parametrize("budget", (64, 256))
def test_flexllms_code_fills_its_rows_and_goes_back_by_whole_layers(budget: int) -> None:
    for view, plan in seen(peers.fixed_budget(budget), MANY):
        assert plan.work.rows <= budget
        assert whole_layers(plan) == any(p.forward_done for p in view.passes)
        waiting = [p for p in view.passes if not p.forward_done]
        if waiting:
            left = 64 * (TILES - waiting[0].fwd_tile)
            assert rows(plan, Kind.FINETUNE) == min(left, (budget - plan.serving.rows) // 64 * 64)


def test_tokens_of_a_budget_are_forward_or_as_much_backward() -> None:
    kinds = set()
    for view, plan in seen(peers.token_budget(128), MANY):
        free = 128 - plan.serving.rows
        assert plan.work.rows <= 128
        tiles = sum(unit.end - unit.first for unit in plan.units)
        assert not (tiles and rows(plan, Kind.FINETUNE)), "one phase of one sample at a time"
        ready = next((p for p in view.passes if p.forward_done), None)
        if ready:
            left = ready.layer * TILES + ready.end_tile
            assert tiles == min(left, free * LAYERS // (2 * 64))
        kinds.add("backward" if tiles else "forward" if rows(plan, Kind.FINETUNE) else "serving")
    assert kinds == {"backward", "forward", "serving"}


def test_a_latency_budget_holds_its_prediction() -> None:
    costs: list[float] = []

    def predicted(view: View, cost: CostModel, plan_id: int) -> Plan:
        plan = peers.latency_budget(60)(view, cost, plan_id)
        if plan.units:
            shapes = {p.id: p.shape for p in view.passes}
            units_s = sum(cost.unit_s(shapes[u.pass_id].backward(u.layer, u.first, u.end)) for u in plan.units)
            costs.append(cost.forward_s(plan.serving) + units_s)
        elif rows(plan, Kind.FINETUNE):
            costs.append(cost.forward_s(plan.work))
        return plan

    seen(predicted, MANY)
    assert costs and max(costs) < 1.2 * 0.6 * 0.2, "a row of backward costs as much as one of forward, nearly"
    assert max(costs) > 0.8 * 0.6 * 0.2


@pytest.mark.parametrize("iterations", (1, 4))
def test_layers_pause_at_a_fixed_rate(iterations: int) -> None:
    for number, (view, plan) in enumerate(seen(peers.layer_pauses(iterations), BUSY)):
        if view.sequences and view.passes:
            assert trains(plan) == (number % iterations == 0)
            assert whole_layers(plan) <= 1 and rows(plan, Kind.FINETUNE) <= 512 // LAYERS
            assert rows(plan, Kind.DECODE, Kind.PREFILL) > 0, "serving never waits for a turn"


def test_serving_alone_trains_nothing() -> None:
    assert not any(trains(plan) for _, plan in seen(peers.serving_alone, BUSY))


@pytest.mark.parametrize(
    "name", ("split 75/25", "temporal 1:7", "9 steps, 1 training", "fixed 48 rows", "55 % of the gap", "a layer in 3")
)
def test_any_setting_has_a_name(name: str) -> None:
    entry = policy_named(name, 0.1, float)
    assert entry.finetuning == (entry.share is None)
    with pytest.raises(SimulationError, match="a layer in N"):
        policy_named(
            name.replace("7", "0").replace("9", "0").replace("4", "x").replace("55", "0").replace("3", "0"), 0.1, float
        )
