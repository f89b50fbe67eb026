"""The weights that a job has kept as its best are exported and carried through checkpoints, bit for bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from coserve_engine.formats import folders
from coserve_engine.job_messages import BestKept, JobStopped
from coserve_engine.messages import (
    AdapterExported,
    CheckpointDone,
    ExportAdapter,
    JobFailed,
    JobStarted,
    KeepBest,
    OptimStep,
    SaveCheckpoint,
    StepDone,
    StopJob,
)
from coserve_engine.training.jobs import Job

STEPS, BEST = 5, 2
WEIGHTS = "adapter_model.safetensors"


def stream(training: Any, folder: Path) -> list[Any]:
    """A job that exports after each step, keeps its weights after step BEST, and saves a checkpoint after each step."""
    commands: list[Any] = []
    steps = 0
    for command in training(steps=STEPS, micros=2):
        commands.append(command)
        if isinstance(command, OptimStep):
            steps += 1
            commands += [KeepBest("job", 0)] * (steps == BEST)
            commands.append(SaveCheckpoint("job", 0, str(folder / f"s{steps}"), {"driver.json": "{}"}))
    commands.append(ExportAdapter("job", 0, str(folder / "best"), "base", best=True))
    return [replace(command, seq_no=number) for number, command in enumerate(commands, 1)]


def weights(folder: Path) -> bytes:
    return (folder / WEIGHTS).read_bytes()


def test_what_was_kept_is_exported_wherever_the_job_was_cut_off(
    driver: Any, training: Any, start_job: Any, tmp_path: Path
) -> None:
    commands = stream(training, tmp_path)
    d = driver()
    d.submit(start_job(), *commands)
    assert d.run().one(BestKept).step == BEST
    assert len(d.of(AdapterExported)) == 1
    expected = weights(tmp_path / f"s{BEST}")
    assert weights(tmp_path / "best") == expected != weights(tmp_path / f"s{STEPS}")
    end = d.parameters()
    for step in range(1, STEPS + 1):
        shutil.rmtree(tmp_path / "best")
        resumed = driver()
        resumed.submit(start_job(resume=str(tmp_path / f"s{step}")), *commands)
        started = resumed.run().one(JobStarted)
        assert (started.step, started.best_step) == (step, BEST if step >= BEST else None)
        assert weights(tmp_path / "best") == expected
        assert torch.equal(resumed.parameters(), end), "keeping changes no bit of the training"


def test_without_keeping_the_bits_are_the_same(driver: Any, training: Any, start_job: Any, tmp_path: Path) -> None:
    plain, kept = driver(), driver()
    plain.submit(start_job(), *training(steps=STEPS, micros=2))
    kept.submit(start_job(), *stream(training, tmp_path))
    assert torch.equal(plain.run().parameters(), kept.run().parameters())


def test_weights_that_are_kept_by_reference_would_be_found(
    driver: Any, training: Any, start_job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: what is not copied goes on changing."""
    keep = Job._keep

    def by_reference(self: Job, command: KeepBest) -> Any:
        event = keep(self, command)
        assert self._state.best is not None
        self._state = replace(self._state, best=self._state.best._replace(param=self._state.param))
        return event

    monkeypatch.setattr(Job, "_keep", by_reference)
    d = driver()
    d.submit(start_job(), *stream(training, tmp_path))
    d.run()
    assert weights(tmp_path / "best") != weights(tmp_path / f"s{BEST}")


def test_a_later_one_takes_the_place_of_an_earlier_one(
    driver: Any, training: Any, start_job: Any, tmp_path: Path
) -> None:
    commands = training(steps=2)
    half = len(commands) // 2
    more = [KeepBest("job", 0), *commands[:half], KeepBest("job", 0), *commands[half:]]
    more += [
        ExportAdapter("job", 0, str(tmp_path / "best"), "base", best=True),
        ExportAdapter("job", 0, str(tmp_path / "end"), "base"),
    ]
    d = driver()
    d.submit(start_job(), *(replace(command, seq_no=n) for n, command in enumerate(more, 1)))
    assert [event.step for event in d.run().of(BestKept)] == [0, 1]
    fresh = driver()
    fresh.submit(start_job(), *commands[:half], ExportAdapter("job", 99, str(tmp_path / "one"), "base"))
    fresh.run()
    assert weights(tmp_path / "best") == weights(tmp_path / "one") != weights(tmp_path / "end")


def test_a_job_that_is_stopped_takes_its_best_along(driver: Any, training: Any, start_job: Any, tmp_path: Path) -> None:
    d = driver()
    d.submit(
        start_job(),
        *training(steps=1),
        KeepBest("job", 50),
        *(replace(c, seq_no=c.seq_no + 60) for c in training(seed=1, steps=1)),
    )
    d.run()
    assert len(d.of(StepDone)) == 2
    d.submit(StopJob("job", str(tmp_path / "stop")))
    assert d.run().one(JobStopped).step == 2
    resumed = driver()
    resumed.submit(start_job(resume=str(tmp_path / "stop")))
    assert resumed.run().one(JobStarted).best_step == 1


def test_best_weights_that_were_never_kept_are_refused(
    driver: Any, training: Any, start_job: Any, tmp_path: Path
) -> None:
    d = driver()
    d.submit(start_job(), *training(steps=1), ExportAdapter("job", 99, str(tmp_path / "a"), "base", best=True))
    failed = d.run().one(JobFailed)
    assert failed.code == "invalid_command"
    assert "KeepBest" in failed.message


# ---- broken files ----


@pytest.fixture
def saved(driver: Any, training: Any, start_job: Any, tmp_path: Path) -> Path:
    d = driver()
    folder = tmp_path / "s1"
    d.submit(start_job(), *training(steps=1), KeepBest("job", 98), SaveCheckpoint("job", 99, str(folder)))
    d.run().one(CheckpointDone)
    return folder


def agree(folder: Path, name: str) -> None:
    """Have the manifest say what the file is."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name]["sha256"] = folders.digest(folder / name)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def refusal(d: Any, command: Any) -> str:
    d.submit(command)
    failed = d.run().one(JobFailed)
    assert failed.code == "invalid_checkpoint"
    return str(failed.message)


def test_best_weights_that_do_not_fit_are_refused(driver: Any, start_job: Any, saved: Path) -> None:
    file = saved / "best.safetensors"
    good = load_file(file)["param"]
    for bad in (good[:-8].clone(), torch.where(torch.arange(good.numel()) == 3, torch.nan, good)):
        save_file({"param": bad}, file)
        agree(saved, file.name)
        assert str(file) in refusal(driver(), start_job(resume=str(saved)))
    file.unlink()
    assert str(file) in refusal(driver(), start_job(resume=str(saved)))


@pytest.mark.parametrize("step", (-1, 2))
def test_a_best_step_that_cannot_be_is_refused(driver: Any, start_job: Any, saved: Path, step: int) -> None:
    facts = json.loads((saved / "state.json").read_text())
    assert facts["best_step"] == 1
    (saved / "state.json").write_text(json.dumps(facts | {"best_step": step}))
    agree(saved, "state.json")
    assert f"best_step is {step}" in refusal(driver(), start_job(resume=str(saved)))
