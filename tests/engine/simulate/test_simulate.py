"""The simulator runs the engine's own scheduler: what it shows is that the promise is kept and the slack filled."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from coserve_engine.latency.cost import CostModel
from coserve_engine.latency.work import ForwardWork, prefill_work
from coserve_engine.scheduler.load import Demand, saturation_percent
from coserve_engine.scheduler.plan import Policy, View
from coserve_engine.scheduler.schedule import IDLE_SHARE, WAIT_SHARE, decide
from coserve_engine.simulate import at_once, world
from coserve_engine.simulate.__main__ import main
from coserve_engine.simulate.bound import capacity, service_s, work_conserving_bound
from coserve_engine.simulate.errors import SimulationError
from coserve_engine.simulate.machine import CPU, ForwardCost, read_machine
from coserve_engine.simulate.peers import fixed_budget, loquetier, temporal
from coserve_engine.simulate.policies import named
from coserve_engine.simulate.requests import Requests
from coserve_engine.simulate.result import RequestTimes, Result
from coserve_engine.simulate.setup import Setup
from coserve_engine.simulate.trace import Arrival, at_rate, drawn, mean_rate, read_trace
from coserve_engine.simulate.world import World, alone_tokens_per_s

TRACE = Path(__file__).parents[3] / "examples" / "data" / "AzureLLMInferenceTrace_conv_10min.csv"
CAPACITY = {0.1: 2.5, 0.2: 3.7}
"""Requests a second of which serving alone keeps the promise to 99 %; `test_load_100_is_the_capacity` checks it."""


@pytest.fixture(scope="module")
def trace() -> list[Arrival]:
    return read_trace(TRACE, 500, 8, 4)


@pytest.fixture(scope="module")
def alone() -> float:
    return alone_tokens_per_s(Setup(CPU))


def run(trace: list[Arrival], slo_s: float, load: float, policy: Policy = decide, **options: Any) -> Result:
    setup = Setup(CPU, tpot_s=slo_s, **options)
    return World(setup, at_rate(trace, load * CAPACITY[slo_s]), policy, reports=True).run()


def nobody_trains(view: View, cost: CostModel, plan_id: int) -> Any:
    return decide(replace(view, passes=()), cost, plan_id)


# ---- what is promised of the scheduler ----


@pytest.mark.parametrize("load", (0.3, 0.5, 0.7))
@pytest.mark.parametrize("slo_s", (0.1, 0.2))
def test_the_slack_is_filled_and_the_promise_kept(
    trace: list[Arrival], alone: float, slo_s: float, load: float
) -> None:
    both, serving = run(trace, slo_s, load), run(trace, slo_s, load, nobody_trains)
    bound = work_conserving_bound(Setup(CPU, tpot_s=slo_s), trace, load * CAPACITY[slo_s])
    assert both.finetune_tokens_per_s / alone >= 0.9 * bound
    assert both.strict_percent >= serving.strict_percent - 1.0
    assert serving.finetune_tokens == 0
    assert both.over_bound <= max(2, both.iterations // 1000)
    assert 2.0 < both.error_percent < 10.0  # the machine's noise is 5 %


def test_without_the_margin_the_promise_is_broken(trace: list[Arrival], monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the same scheduler with bounds that are predictions."""
    monkeypatch.setattr(CostModel, "forward_ratio", 1.0)
    assert run(trace[:250], 0.1, 0.5).strict_percent < 90.0


def test_more_noise_costs_time_and_not_the_promise(trace: list[Arrival]) -> None:
    calm, rough = (run(trace[:250], 0.1, 0.3, noise=noise) for noise in (0.02, 0.15))
    assert rough.strict_percent >= 98.0
    assert rough.finetune_tokens_per_s < calm.finetune_tokens_per_s
    assert rough.gap_ms(50) < calm.gap_ms(50)


@pytest.mark.parametrize("policy", (fixed_budget(256), loquetier(5), temporal(64)))
def test_policies_without_a_promise_break_it(trace: list[Arrival], policy: Policy) -> None:
    setup = Setup(CPU, tpot_s=0.1)
    result = World(setup, at_rate(trace[:200], 0.7), policy, stops=False).run()
    assert result.strict_percent < 90.0
    assert result.finetune_tokens > 0
    assert all(math.isfinite(r.first_s) for r in result.requests)


def test_a_limit_of_the_slowdown_trades_finetuning_for_the_median_gap(trace: list[Arrival]) -> None:
    runs = [run(trace[:200], 0.2, 0.3, max_slowdown=limit) for limit in (0.0, 1.0, 4.0, None)]
    gaps = [r.gap_ms(50) for r in runs]
    rates = [r.finetune_tokens_per_s for r in runs]
    assert gaps == sorted(gaps) and rates == sorted(rates)
    serving = run(trace[:200], 0.2, 0.3, nobody_trains)
    assert gaps[0] < 1.1 * serving.gap_ms(50)
    assert rates[0] > 0, "while nobody is served the job goes on"
    assert gaps[-1] > 3 * gaps[0]


@pytest.mark.parametrize("slo_s", (0.1, 0.2))
@pytest.mark.parametrize("load", (0.2, 0.5, 0.8))
def test_saturation_is_blind_to_finetuning(
    trace: list[Arrival], monkeypatch: pytest.MonkeyPatch, slo_s: float, load: float
) -> None:
    both, serving = run(trace, slo_s, load), run(trace, slo_s, load, nobody_trains)
    means = [sum(r.saturation) / len(r.saturation) for r in (both, serving)]
    assert abs(means[0] - means[1]) < 5.0
    if load == 0.5:

        def counted(demand: Demand, *others: Any) -> float:
            return saturation_percent(replace(demand, finetune_share=0.0), *others)

        monkeypatch.setattr(world, "saturation_percent", counted)
        control = run(trace, slo_s, load)
        assert sum(control.saturation) / len(control.saturation) > means[1] + 5.0


# ---- the world ----


def test_one_request_takes_what_its_forwards_take() -> None:
    setup = Setup(CPU, noise=0.0)
    result = World(setup, [Arrival(0.0, 40, 4)], nobody_trains).run()
    (times,) = result.requests
    turnaround_s = CPU.turnaround_ms / 1e3
    assert times.first_s == pytest.approx(CPU.forward_s(prefill_work(0, 40, 64)))
    assert times.gaps_s == pytest.approx([turnaround_s + CPU.forward_s(ForwardWork(decode=1))] * 3)
    assert result.iterations == 4


def longest_wait_s(setup: Setup) -> float:
    """Of requests that come when nobody is served, beyond what the first token takes."""
    source, prompt = random.Random(1), 16
    arrivals = [Arrival(3.0 * i + source.random(), prompt, 1) for i in range(1, 60)]
    waits = [times.first_s for times in World(setup, arrivals, decide).run().requests]
    assert None not in waits
    return max(waits) - setup.machine.forward_s(prefill_work(0, prompt, setup.tile))  # type: ignore[type-var, operator]


def test_a_request_that_comes_to_nobody_does_not_wait_for_a_long_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(CPU.slower(3), noise=0.0)
    layer_s = setup.ttft_s * IDLE_SHARE / setup.machine.layers
    assert longest_wait_s(setup) < WAIT_SHARE * setup.ttft_s + layer_s
    monkeypatch.setattr(at_once, "gives_way", lambda *_: False)
    assert longest_wait_s(setup) > 2 * WAIT_SHARE * setup.ttft_s


def test_the_same_seed_is_the_same_run(trace: list[Arrival]) -> None:
    first, again, other = (run(trace[:60], 0.1, 0.5, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_every_request_ends_under_every_policy(trace: list[Arrival]) -> None:
    for name, entry in named(0.1, lambda rows: 0.0155 + 0.66e-3 * rows).items():
        result = World(Setup(CPU), at_rate(trace[:60], 1.0), entry.policy, finetuning=entry.finetuning).run()
        assert all(len(r.gaps_s) == a.output - 1 for r, a in zip(result.requests, trace, strict=False)), name
        assert (result.finetune_tokens > 0) == entry.finetuning, name


def test_pages_that_lack_are_taken_from_passes(trace: list[Arrival]) -> None:
    longest = max(a.prompt + a.output for a in trace[:100])
    tight = Setup(CPU, kv_pages=-(-longest // 64) + 9)
    result = World(tight, at_rate(trace[:100], 1.0), decide).run()
    assert all(math.isfinite(r.first_s) for r in result.requests)
    assert 0 < result.finetune_tokens < World(Setup(CPU), at_rate(trace[:100], 1.0), decide).run().finetune_tokens
    with pytest.raises(SimulationError, match="KV pages"):
        World(Setup(CPU, kv_pages=1), trace[:5], decide).run()


def test_the_youngest_is_preempted_and_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight requests fit when they come and outgrow the pool together; the oldest never waits again."""
    preempted: list[int] = []
    preempt = Requests.preempt_youngest

    def spy(self: Requests) -> None:
        preempted.append(next(reversed(self.running)))
        preempt(self)

    monkeypatch.setattr(Requests, "preempt_youngest", spy)
    setup = Setup(CPU, tpot_s=1.0, noise=0.0, kv_pages=1 + 8 * 3)
    w = World(setup, [Arrival(0.001 * n, 60, 200) for n in range(8)], decide)
    result = w.run()
    assert preempted and 1 not in preempted
    assert [len(r.gaps_s) for r in result.requests] == [199] * 8
    assert w.pool.extend() and w.pool.headroom == 0 and not w.requests.running
    stalls = [max(r.gaps_s) for r in result.requests]
    assert stalls[0] < 1.0 < max(stalls)


def test_strict_and_mean_differ_in_stalls() -> None:
    stalled = RequestTimes(0.0, 0.5, [0.01] * 49 + [0.3])
    assert stalled.by_mean(1.0, 0.1) and not stalled.strict(1.0, 0.1)
    assert RequestTimes(0.0, 0.5, [0.01] * 99 + [0.3]).strict(1.0, 0.1), "one gap in a hundred may be late"
    assert not RequestTimes(0.0, 1.5, []).by_mean(1.0, 0.1)


# ---- load and bound ----


def test_load_100_is_the_capacity(trace: list[Arrival]) -> None:
    setup = Setup(CPU, tpot_s=0.1)
    found = capacity(setup, trace)
    assert found == pytest.approx(CAPACITY[0.1], rel=0.1)
    above = World(setup, at_rate(trace, 1.5 * found), nobody_trains).run()
    assert above.strict_percent < 99.0


def test_the_bound_is_its_formula() -> None:
    arrivals, machine = [Arrival(0.0, 100, 51), Arrival(1.0, 100, 51)], replace(CPU, turnaround_ms=0.0)
    assert service_s(machine, arrivals[0], 64) == pytest.approx(0.100 * 0.66 + 50 * 1.32e-3)
    setup = Setup(machine, tpot_s=0.1)
    expected = 1 - (0.5 * (0.066 + 0.066) + 0.0155 / (0.8 * 0.1))
    assert work_conserving_bound(setup, arrivals, 0.5, margin=0.8) == pytest.approx(expected)
    assert work_conserving_bound(setup, arrivals, 50.0) == 0.0


# ---- traces and machines ----


@pytest.mark.parametrize("variation", (1.0, 3.0))
def test_drawn_arrivals_have_their_rate_and_variation(variation: float) -> None:
    found = drawn(20_000, 4.0, variation, 100, 50, seed=1)
    gaps = [b.at_s - a.at_s for a, b in pairwise(found)]
    mean = sum(gaps) / len(gaps)
    spread = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert mean == pytest.approx(0.25, rel=0.1)
    assert spread / mean == pytest.approx(variation, rel=0.1)
    assert mean_rate(at_rate(found, 7.0)) == pytest.approx(7.0)


HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
LINE = "2023-11-16 18:15:46.6805900,374,44\n"


def test_a_trace_is_read_and_scaled(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(HEAD + LINE + "2023-11-16 18:15:50.9951690,396,1\n")
    assert read_trace(path, 9, 8, 4) == [Arrival(0.0, 47, 11), Arrival(pytest.approx(4.314579), 50, 1)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("when,how\n1,2\n", ["ContextTokens", "first line"]),
        (HEAD + LINE, ["1 requests", "at least 2"]),
        (HEAD + LINE + "soon,1,1\n", ["line 3"]),
        (HEAD + LINE + "2023-11-16 18:15:50.9,many,1\n", ["line 3", "many"]),
        (HEAD + LINE + "2023-11-16 18:15:40.0,1,1\n", ["sort the trace"]),
    ],
)
def test_a_broken_trace_is_explained(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(SimulationError) as caught:
        read_trace(path, 10)
    assert all(word in str(caught.value) for word in [str(path), *words])


def test_a_machine_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    cost: dict[str, Any] = {
        "forward": {"fixed_ms": 10, "decode_ms": 1, "prefill_ms": 0.5, "finetune_ms": 0.5},
        "unit": {"fixed_ms": 1, "row_ms": 0.1},
        "head": {"fixed_ms": 1, "row_ms": 0.2},
        "layers": 4,
    }
    path.write_text(json.dumps(cost))
    machine = read_machine(str(path))
    assert machine.forward == ForwardCost(10, 1, 0.5, 0.5)
    assert machine.slower(2.0).forward_s(ForwardWork(decode=3)) == pytest.approx(2 * 0.013)

    def refused(change: Callable[[dict[str, Any]], Any], words: str) -> None:
        broken = json.loads(json.dumps(cost))
        change(broken)
        path.write_text(json.dumps(broken))
        with pytest.raises(SimulationError, match=words):
            read_machine(str(path))

    refused(lambda c: c.pop("unit"), "unit")
    refused(lambda c: c["unit"].update(row_ms=-1), r"unit\.row_ms is -1")
    refused(lambda c: c.update(speed=1), "speed")
    with pytest.raises(SimulationError, match=r"neither cpu nor h200 nor h200-1b nor a file"):
        read_machine("tpu")


# ---- the command ----

QUICK = ["--requests", "60", "--slo-ms", "100", "--load", "50"]


def test_the_command_prints_a_table_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "out.png"
    options = ["--trace", str(TRACE), *QUICK, "--policies", "ours", "split 50/50", "--frontier", "--plot", str(picture)]
    assert main(options) == 0
    text = capsys.readouterr().out
    assert "load 100 % is" in text and "% bound" in text
    (split,) = [line for line in text.splitlines() if line.startswith("split 50/50")]
    assert float(split.split()[6]) == 50.0
    assert re.fullmatch(r"simulated [\d.]+ h in [\d.]+ s: [\d,]+ times real time, [\d,]+ .*", text.splitlines()[-1])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_command_takes_pauses(capsys: pytest.CaptureFixture[str]) -> None:
    def finetuning(*options: str) -> float:
        assert main(["--drawn", "1", *QUICK, "--policies", "ours", *options]) == 0
        (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ours")]
        return float(row.split()[-7])

    assert 0 < finetuning("--pauses", "heavy") < finetuning()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--trace", "nowhere.csv"], ["nowhere.csv", "--trace"]),
        ([], ["--trace", "--drawn"]),
        (["--drawn", "1", "--load", "0"], ["--load", "above zero"]),
        (["--drawn", "1", "--noise", "2"], ["--noise", "2"]),
        (["--drawn", "1", "--requests", "1"], ["--requests"]),
        (["--drawn", "1", "--cost", "tpu"], ["tpu", "cpu"]),
        (["--drawn", "1", "--pauses", "light"], ["light", "heavy"]),
        (["--drawn", "1", "--requests", "20", "--slo-ms", "1"], ["--slo-ms", "longer"]),
        (["--drawn", "1", *QUICK, "--policies", "best"], ["best", "ours"]),
        (["--drawn", "1", *QUICK, "--policies", "temporal 1:0"], ["temporal 1:0", "temporal 1:N"]),
    ],
)
def test_wrong_flags_are_explained(options: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options) == 2
    message = capsys.readouterr().err
    assert message.startswith("error:") and all(word in message for word in words)
