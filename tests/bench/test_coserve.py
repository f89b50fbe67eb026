"""What is compared, and how the best of each is found; the command on an engine's figures that were made up."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "bench"))

from coserve.__main__ import main  # noqa: E402
from coserve.families import ALONE, FAMILIES, OURS, Family  # noqa: E402
from coserve.interval import mean  # noqa: E402
from coserve.minute import minute  # noqa: E402
from coserve.real import Measured, Replayed, mean_machine, read_measured  # noqa: E402
from coserve.report import ASKED, markdown  # noqa: E402
from coserve.study import Load, Results, explore, slices  # noqa: E402

from coserve_engine.simulate.compare import Case, Row  # noqa: E402
from coserve_engine.simulate.errors import SimulationError  # noqa: E402
from coserve_engine.simulate.machine import CPU  # noqa: E402
from coserve_engine.simulate.pauses import Pauses  # noqa: E402
from coserve_engine.simulate.policies import policy_named  # noqa: E402
from coserve_engine.simulate.setup import Setup  # noqa: E402
from coserve_engine.simulate.trace import Arrival, drawn  # noqa: E402

TRACE = ROOT / "examples" / "data" / "AzureLLMInferenceTrace_conv_10min.csv"


def row(policy: str, finetuning: float, strict: float = 100.0, ttft_ms: float = 500.0, tpot_ms: float = 50.0) -> Row:
    return Row(policy, 100, 70, strict, strict, finetuning, 0, 30, 90, 0, 3, 0, 60, ttft_ms, tpot_ms)


def load(seeds: int = 3, percent: float = 70.0) -> Load:
    arrivals = tuple(drawn(40, 1.0, 1.0, 60, 10, seed=0))
    return Load(tuple(Case(Setup(CPU, seed=seed), arrivals, 2.0, 400.0, percent) for seed in range(seeds)))


ALONE_ROWS = [row(ALONE, 0.0, 99.0), row(ALONE, 0.0, 100.0), row(ALONE, 0.0, 98.0)]
FOUR = Family("one", "other", ("a", "b", "c", "d"), "")


def explored(strict: dict[str, tuple[float, ...]], thorough: bool = False) -> dict[str, list[Row]]:
    """Of settings that get more the rougher they are, with these attainments by seed; nobody's TTFT is held."""

    def run(case: Case, name: str) -> Row:
        return row(name, 10.0 * (1 + "abcd".index(name)), strict[name][case.setup.seed], ttft_ms=5000)

    return explore(load(), FOUR, ALONE_ROWS, thorough, run)


def test_every_setting_is_a_policy() -> None:
    for family in FAMILIES:
        for name in family.settings:
            assert policy_named(name, 0.1, CPU_FORWARD).finetuning == (not name.startswith("split"))
    assert {family.kind for family in FAMILIES} == {"other", "beyond", "ablation"}


def CPU_FORWARD(rows: int) -> float:  # noqa: N802
    return 0.0155 + 0.66e-3 * rows


def test_the_best_that_keeps_the_promise_on_all_seeds_is_found() -> None:
    found = explored({"a": (99, 99, 98), "b": (98.5, 99, 97), "c": (98, 90, 90), "d": (20, 20, 20)})
    assert {name: len(rows) for name, rows in found.items()} == {"a": 1, "b": 3, "c": 3, "d": 1}
    at = load()
    results = Results([at])
    results.add(at, ALONE, ALONE_ROWS)
    results.add(at, OURS, [row(OURS, rate) for rate in (50.0, 60.0, 55.0)])
    for name, rows in found.items():
        results.add(at, name, rows)
    best = results.best(at, FOUR)
    assert (best.setting, best.rate.value) == ("b", 20.0)
    ratio = results.ratio(at, best)
    assert ratio is not None and ratio.value == pytest.approx(2.75) and ratio.within > 0
    assert results.best(at, FOUR, strict=False).setting is None


def test_one_point_below_serving_alone_is_the_limit() -> None:
    at, rows = load(), {"kept": 98.0, "broken": 97.9}
    results = Results([at])
    results.add(at, ALONE, ALONE_ROWS)
    for name, strict in rows.items():
        results.add(at, name, [row(name, 1.0, strict)] * 3)
    assert results.keeps(at, "kept") and not results.keeps(at, "broken")
    assert results.keeps(at, "broken", strict=False), "P99 of first tokens and mean gaps say nothing of it"
    assert not results.keeps(at, "never run")


def test_a_sweep_ends_where_the_promise_is_far() -> None:
    rough = {"a": (90.0,) * 3, "b": (80.0,) * 3, "c": (99.0,) * 3, "d": (99.0,) * 3}
    assert list(explored(rough)) == ["a", "b"]
    assert list(explored(rough, thorough=True)) == ["a", "b", "c", "d"]


def test_slices_are_neighbours_spread_over_the_trace() -> None:
    arrivals = [Arrival(float(n), n + 1, 1) for n in range(100)]
    parts = slices(arrivals, 3, 20)
    assert [part[0].prompt for part in parts] == [1, 41, 81]
    assert all(part[0].at_s == 0.0 and part[-1].at_s == 19.0 and len(part) == 20 for part in parts)
    assert slices(arrivals, 1, 20)[0][0].prompt == 1


def test_an_interval_is_students() -> None:
    """Of 1, 2, 3: mean 2, standard error 1 / sqrt(3), quantile 4.303."""
    assert mean([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / math.sqrt(3)))
    assert mean([5.0]).value == 5.0 and str(mean([5.0])) == "5.0"


def test_a_minute_counts_what_the_run_did() -> None:
    case = load(1).seeds[0]
    ours, alone = (minute(case, name, 5.0) for name in (OURS, ALONE))
    assert len(ours.seconds) == len(ours.finetuning) == len(ours.requests) == 60
    assert sum(ours.finetuning) > 0 == sum(alone.finetuning)
    assert all(0 <= at_s < 60 for at_s in ours.gap_at_s) and len(ours.gap_at_s) == len(ours.gaps_ms)


def measured() -> Measured:
    real = tuple(
        Replayed(name, 30, 100.0, 100.0, rate, 4 * rate, 90, 180, 400, 20) for name, rate in ((OURS, 60), (ALONE, 0))
    )
    simulated = tuple(replace(block, tokens_per_s=1.05 * block.tokens_per_s) for block in real)
    return Measured(
        CPU, 0.05, Pauses(0.1, (5.0, 7.0)), 1024, 64, 400.0, 410.0, 50.0, 200.0, 1.5, real, simulated, ("loaded",)
    )


def test_what_was_measured_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"measured": asdict(measured())}))
    assert read_measured(path) == measured()
    assert read_measured(path).error_percent(OURS) == pytest.approx(5.0)
    for text in ("{}", "[1", '{"measured": {"noise": 1}}'):
        path.write_text(text)
        with pytest.raises(SimulationError, match="--measured"):
            read_measured(path)


def test_machines_that_were_learned_are_averaged() -> None:
    found = mean_machine([CPU, CPU.slower(3.0)])
    assert found.forward == pytest.approx(CPU.slower(2.0).forward) and found.layers == CPU.layers


def test_the_command_writes_tables_plots_and_every_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, earlier, out = tmp_path / "trace.csv", tmp_path / "results.json", tmp_path / "out"
    trace.write_text("".join(TRACE.read_text().splitlines(keepends=True)[:41]))
    earlier.write_text(json.dumps({"measured": asdict(measured())}))
    common = ["--quick", "--measured", str(earlier), "--trace", str(trace), "--out", str(out), "--seeds", "2"]
    assert main([*common, "--requests", "20", "--slo-ms", "200", "--load", "30", "70"]) == 0
    text, raw = (out / "results.md").read_text(), json.loads((out / "results.json").read_text())
    assert text in capsys.readouterr().out
    assert "ours +5.0 %" in text and "1.3 x:" in text and "2.5 x:" in text
    assert {run["policy"] for run in raw["runs"]} >= {OURS, ALONE, "fixed 64 tokens", "ours, no model"}
    assert [entry["load_percent"] for entry in raw["loads"]] == [30.0, 70.0]
    for name in ("rate-load", "rate-gap", "minute"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert main([*common, "--slo-ms", "2"]) == 2
    assert "choose a longer" in capsys.readouterr().err


def test_a_target_that_is_missed_is_said(tmp_path: Path) -> None:
    at = load(2, 70.0)
    results = Results([at])
    for name, rate in ((OURS, 50.0), (ALONE, 0.0), ("split 70/30", 30.0), ("split 90/10", 10.0)):
        results.add(at, name, [row(name, rate)] * 2)
    assert f"{ASKED[70.0]} x: not met" in markdown(results, measured(), "a machine")
    results.rows[100.0, 70.0, "split 70/30"] = [row("split 70/30", 30.0, 50.0)] * 2
    assert f"{ASKED[70.0]} x: met" in markdown(results, measured(), "a machine")
