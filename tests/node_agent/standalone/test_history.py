"""A job's steps in order, each once, wherever they are kept."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from coserve_agent.jobs.evaluations import EvalRecord
from coserve_agent.jobs.trainlog import StepRecord
from coserve_agent.standalone.history import KEPT, History

JOB = "uid-1"


def step(number: int) -> StepRecord:
    return StepRecord(number, 1.0 / number, 1e-3, 0.5, 10, (1, 2))


def written(folder: Path, last: int, evaluations: tuple[int, ...] = (0,)) -> Path:
    (folder / "training_log.jsonl").write_text("".join(step(n).line() for n in range(1, last + 1)))
    lines = [json.dumps(asdict(EvalRecord(n, 2.0))) + "\n" for n in evaluations]
    (folder / "evaluations.jsonl").write_text("".join(lines))
    return folder


async def told(history: History, after: tuple[int, int], folder: Path | None) -> list[tuple[str, int]]:
    return [(one["type"], one["step"]) for one in await history.after(JOB, after, folder)]


async def test_what_memory_lacks_is_read_from_the_checkpoint(tmp_path: Path) -> None:
    history = History()
    folder = written(tmp_path, 5)
    assert await told(history, (-1, 1), folder) == [("evaluation", 0), *[("step", n) for n in range(1, 6)]]
    for number in (4, 5, 6):  # as after a start that went on from step 3
        history.add(JOB, step(number))
    history.add(JOB, EvalRecord(6, 1.5))
    assert await told(history, (2, 1), folder) == [("step", n) for n in range(3, 7)] + [("evaluation", 6)]
    assert await told(history, (5, 1), None) == [("step", 6), ("evaluation", 6)]
    assert await told(history, (6, 1), folder) == []


async def test_a_step_that_is_done_again_is_told_once() -> None:
    history = History()
    for number in (1, 2, 3, 2, 3, 4):
        history.add(JOB, step(number))
    assert await told(history, (0, 1), None) == [("step", n) for n in range(1, 5)]


async def test_memory_is_bounded_and_logs_that_do_not_read_hide_nothing(tmp_path: Path) -> None:
    history = History()
    for number in range(1, KEPT + 3):
        history.add(JOB, step(number))
    (tmp_path / "training_log.jsonl").write_text("{")
    assert len(await told(history, (-1, 1), tmp_path)) == KEPT
