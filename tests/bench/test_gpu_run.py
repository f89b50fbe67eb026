"""The script for a borrowed GPU, rehearsed: it needs nothing but the engine's libraries, stops at its limit, and goes
on from what is there.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from coserve_engine.formats.model_folder import read_model_config
from coserve_engine.kernels.torch import table
from coserve_engine.tensors.dtypes import Dtypes

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "bench"), str(ROOT / "bench" / "gpu")]

import exactness  # noqa: E402
import floors  # noqa: E402
from busy import counted_twins, noted  # noqa: E402
from held import Peak, compare  # noqa: E402
from machine import Rates  # noqa: E402
from models import LLAMA_31_8B, write_config, write_model  # noqa: E402
from runner import OtherRunError, OutOfTimeError, Results, Step, run_steps  # noqa: E402

OF = {"machine": "one", "source": "a"}
ABSENT = ("accelerate", "fastapi", "hypothesis", "peft", "pydantic", "pytest", "redis", "transformers")


def rehearse(out: Path, *arguments: str, triton: str = "missing") -> subprocess.CompletedProcess[str]:
    """With none of ABSENT to import, as where only torch, numpy and safetensors are installed, and no triton or one
    whose libraries do not load.
    """
    absent = (*ABSENT, "triton") if triton == "missing" else ABSENT
    (out.parent / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({absent!r}))\n")
    (out.parent / "triton.py").write_text("raise OSError('libtriton.so: cannot open')\n")
    python = out.parent / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{out.parent}:$PYTHONPATH" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    command = [str(ROOT / "bench" / "gpu" / "run"), "--out", str(out), *arguments]
    environment = {**os.environ, "PYTHON": str(python), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_a_rehearsal_ends_at_its_limit_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    cut = rehearse(out, "--rehearse", "--limit", "0")
    assert (cut.returncode, cut.stderr) == (3, "") and "'parity plain' and what follows is left" in cut.stdout
    assert "triton: missing (ModuleNotFoundError: " in cut.stdout
    whole = rehearse(out, "--rehearse", "--limit", "600", triton="broken")
    assert whole.returncode == 0, whole.stdout + whole.stderr + (out / "summary.md").read_text()
    results = json.loads((out / "results.json").read_text())
    assert results["of"]["triton"] == "broken (OSError: libtriton.so: cannot open)"
    steps = results["steps"]
    assert steps["parity plain"]["met"] and steps["parity of a job"]["met"]
    assert steps["waits"]["met"] and steps["waits"]["waits"] == {} == steps["waits"]["twins"]
    assert {f"decode {rows}" for rows in (1, 16, 64)} | {f"both at {n} % load" for n in (30, 70)} <= steps.keys()
    assert set(steps["finetuning, word by word"]["us"]) == {*steps["finetuning, word by word"]["floor_us"], "rest"}
    assert sorted(path.name for path in out.iterdir()) == ["results.json", "summary.md"]
    before = (out / "results.json").read_bytes()
    for name in ("waits", "finetuning alone"):
        plan, taken = (steps[name]["bytes"][what] for what in ("planned", "taken"))
        assert plan["weights"] == taken["weights"] and plan["KV cache"] == taken["KV cache"]
        assert 0 < taken["state of jobs"] <= plan["state of jobs"] and 0 < taken["passes"] <= plan["passes"]
    assert rehearse(out, "--rehearse", triton="broken").returncode == 0
    assert (out / "results.json").read_bytes() == before, "a step was run twice"


def test_without_a_device_it_says_what_to_do(tmp_path: Path) -> None:
    refused = rehearse(tmp_path / "out")
    assert refused.returncode == 2 and "--rehearse" in refused.stderr
    assert not (tmp_path / "out").exists()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def taking(clock: Clock, ran: list[str], name: str, seconds: float, error: Exception | None = None) -> Step:
    def run(until: float) -> dict[str, Any]:
        assert until == clock.now + 10
        clock.now += seconds
        ran.append(name)
        if error is not None:
            raise error
        return {"lines": [f"- {name}"]}

    return Step(name, 10, run)


def test_a_step_begins_only_where_its_budget_is_left(tmp_path: Path) -> None:
    clock, ran = Clock(), []
    plan = [taking(clock, ran, name, 8) for name in "abc"]
    assert run_steps(plan, Results(tmp_path, OF), clock, 20, lambda _: None) == "c"
    assert ran == ["a", "b"]
    assert run_steps(plan, Results(tmp_path, OF), clock, clock.now + 10, lambda _: None) is None
    assert ran == ["a", "b", "c"]


def test_a_step_that_failed_or_was_cut_is_tried_again(tmp_path: Path) -> None:
    clock, ran = Clock(), []
    failing = taking(clock, ran, "a", 1, ValueError("no such kernel"))
    cut = taking(clock, ran, "b", 1, OutOfTimeError())
    results = Results(tmp_path, OF)
    assert run_steps([failing, cut], results, clock, 100, lambda _: None) == "b"
    assert "no such kernel" in results.steps["a"]["error"] and "FAILED" in (tmp_path / "summary.md").read_text()
    again = Results(tmp_path, OF)
    assert not again.done("a") and not again.held("a") and not again.done("b")
    assert run_steps([taking(clock, ran, name, 1) for name in "ab"], again, clock, 100, lambda _: None) is None
    assert ran == ["a", "b", "a", "b"] and again.held("a")


def test_a_step_that_does_not_end_is_cut_at_the_limit(tmp_path: Path) -> None:
    def forever(_: float) -> dict[str, Any]:
        for _ in itertools.count():
            pass
        raise AssertionError

    clock = Clock()
    assert run_steps([Step("a", 0, forever)], Results(tmp_path, OF), clock, 0.01, lambda _: None) == "a"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", OF)
def test_figures_of_another_machine_or_source_are_not_mixed(tmp_path: Path, name: str) -> None:
    Results(tmp_path, OF).add("a", {"seconds": 1.0})
    with pytest.raises(OtherRunError, match=f"{name} is .*name an empty folder"):
        Results(tmp_path, {**OF, name: "other"})


def test_memory_is_held_to_its_plan_part_by_part() -> None:
    plan, found = {"weights": 100, "passes": 50, "an iteration": 30, "KV cache": 20}, {"weights": 100, "passes": 40}
    peak = Peak(most=170, between=145, reserved=190, outside=7)
    met = compare(plan, found, peak)
    assert met["met"] and met["bytes"]["taken"]["an iteration"] == 25
    assert met["bytes"]["taken"]["held, by nothing named here"] == 5
    for name, more in (
        ("passes", compare(plan, {**found, "passes": 51}, None)),
        ("an iteration", compare(plan, found, replace(peak, most=176))),
        ("all that torch reserved", compare(plan, found, replace(peak, reserved=201))),
    ):
        assert not more["met"]
        assert next(line for line in more["lines"] if "MORE" in line).startswith(f"| {name} |")


def test_a_wait_is_counted_where_the_engine_waits() -> None:
    """As torch warns of one; without a GPU it never does."""
    text = "import warnings\ndef finite():\n    warnings.warn('called a synchronizing CUDA operation')\n"
    text += "    warnings.warn('does not yet detect all synchronizing operations')\n"
    place: dict[str, Any] = {}
    exec(compile(text, "/site/coserve_engine/serving/sampling.py", "exec"), place)
    seen: Counter[str] = Counter()
    with noted(seen):
        for _ in range(2):
            place["finite"]()
    assert seen == {"serving/sampling.py:3 finite": 2}


def test_a_word_without_its_kernel_is_counted() -> None:
    plain = object.__new__(table.TorchKernels)
    object.__setattr__(plain, "dtypes", Dtypes.of("bfloat16"))
    a = torch.ones(2, 4)
    for device, count in (("cuda", 1), ("cpu", 0)):
        with counted_twins(torch.device(device)) as seen:
            plain.gate(a, a)
        assert seen == ({"gate": count} if count else {})


def test_a_table_that_errs_is_not_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of parity: a decode row that sees one key too many."""
    hidden = table.hidden_keys
    monkeypatch.setattr(table, "hidden_keys", lambda positions, keys, window: hidden(positions + 1, keys, window))
    found = exactness.parity(write_model(tmp_path, {}), torch.device("cpu"))
    assert not found["met"] and found["float32 logits"]["error"] > found["float32 logits"]["bound"]
    assert found["float32 gradient"]["error"] <= found["float32 gradient"]["bound"], "no decode row in it"


def test_floors_of_llama_31_8b(tmp_path: Path) -> None:
    """By hand: 30.0 GFLOP a token in products and head, 3.76 in attention over 4,096, 0.29 in LoRA of rank 16; decode
    reads 15.0 GB of weights and 131,072 bytes a token of context.
    """
    model = read_model_config(write_config(tmp_path, LLAMA_31_8B))
    gflop = floors.finetune_us(model, 4096, 16, Rates(1e15, 1e12))
    assert gflop["products"] + gflop["head"] == pytest.approx(30.0, abs=0.05)
    assert gflop["attention"] == pytest.approx(3.76, abs=0.01)
    assert gflop["LoRA"] == pytest.approx(0.29, abs=0.01)
    assert floors.decode_ms(model, 1, 0, Rates(1e15, 1e12)) == pytest.approx(15.0, abs=0.02)
    fast = Rates(1e18, 1e12)
    per_token_ms = (floors.decode_ms(model, 1, 1001, fast) - floors.decode_ms(model, 1, 1, fast)) / 1000
    assert per_token_ms == pytest.approx(131_072 / 1e9)
