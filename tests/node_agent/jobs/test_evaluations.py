"""What follows from a job's evaluations, and how checkpoints carry them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from driver_rig import TOTAL, MakeRig, Rig, running
from hypothesis import given
from hypothesis import strategies as st

from coserve_agent.errors import JobFailedError
from coserve_agent.jobs.driver import StopRequested
from coserve_agent.jobs.evaluations import EvalLog, EvalRecord
from coserve_agent.jobs.inflight import Evaluation
from coserve_agent.jobs.trainlog import StepRecord, TrainingLog
from coserve_api.job import PublishPolicy
from coserve_api.job_status import FailedReason
from coserve_engine.formats.folders import verify_folder
from coserve_engine.messages import ForwardBackward, KeepBest, PassDone, PassMode, SaveCheckpoint

OLD = Path(__file__).parent / "checkpoint_without_evaluations"
"""As agents wrote it before they kept evaluations: step 4 of a job of rank 1, evaluated at 0 and 3."""
WEIGHTS = "adapter_model.safetensors"


def log_of(*losses: float | None) -> EvalLog:
    return EvalLog(tuple(EvalRecord(2 * n, loss, 5, 60) for n, loss in enumerate(losses)))


@pytest.mark.parametrize(
    ("losses", "best", "since"),
    [
        ((), None, 0),
        ((3.0,), 0, 0),
        ((3.0, 2.0, 2.5), 2, 1),
        ((3.0, 2.0, 2.0, 2.0), 2, 2),  # the earliest of equals
        ((1.0, 2.0, 3.0), 0, 2),
        ((None, None, None), None, 2),  # what is not finite is never best
        ((None, 2.0, None), 2, 1),
        ((3.0, None, 2.0), 4, 0),
    ],
)
def test_the_best_is_the_earliest_of_the_lowest(losses: tuple[float | None, ...], best: int | None, since: int) -> None:
    log = log_of(*losses)
    assert (None if log.best is None else log.best.step) == best
    assert log.since_best == since
    assert log.improved == (best is not None and best > 0)


@given(st.lists(st.none() | st.floats(0, 10), max_size=30))
def test_each_evaluation_is_asked_once_whether_it_is_best(losses: list[float | None]) -> None:
    """Looking back gives what looking on gave, and the file gives all of it back."""
    log, kept = EvalLog(), None
    for step, loss in enumerate(losses):
        if log.is_best(loss):
            kept = step
        log = log.plus(EvalRecord(step, loss))
    assert kept == (None if log.best is None else log.best.step)
    assert EvalLog.from_text(log.text()) == log
    assert [one.step for one in log.last()] == list(range(len(losses)))[-10:]


def test_a_loss_that_is_not_finite_has_no_value() -> None:
    running_one = Evaluation()
    running_one.on_pass(PassDone("j", 1, PassMode.EVAL, math.nan, 3.0, 9))
    assert running_one.record(4) == EvalRecord(4, None, 0, 9)
    assert '"loss":null' in EvalLog((running_one.record(4),)).text()


# ---- checkpoints ----


def trained(steps: int) -> TrainingLog:
    log = TrainingLog()
    log.note_eval(EvalRecord(0, 3.0, 5, 60))
    for step in range(1, steps + 1):
        log.add(StepRecord(step, 2.0, 1e-2, 0.1, 40, (1, 2)))
        if step % 2 == 0:
            log.note_eval(EvalRecord(step, 3.0 - step / 10, 5, 60))
    return log


def test_a_checkpoint_brings_the_evaluations_back() -> None:
    log = trained(5)
    assert set(log.files()) == {"training_log.jsonl", "evaluations.jsonl", "driver.json"}
    again = TrainingLog.from_files(log.files(), 5)
    assert (again.evals, again.state) == (log.evals, log.state)
    assert json.loads(log.files()["evaluations.jsonl"].splitlines()[1]) == {
        "step": 2, "loss": 2.8, "samples": 5, "tokens": 60,
    }  # fmt: skip


def test_one_without_the_file_says_what_its_state_says() -> None:
    files = trained(5).files()
    del files["evaluations.jsonl"]
    again = TrainingLog.from_files(files, 5)
    assert again.evals.records == (EvalRecord(0, 3.0), EvalRecord(4, 2.6))
    assert TrainingLog.from_files(TrainingLog().files(), 0).evals == EvalLog()


def test_evaluations_of_another_step_are_refused() -> None:
    files = trained(5).files() | {"evaluations.jsonl": trained(3).files()["evaluations.jsonl"]}
    with pytest.raises(JobFailedError, match=r"eval_step 4, the last of evaluations.jsonl is 2") as caught:
        TrainingLog.from_files(files, 5)
    assert caught.value.reason is FailedReason.ARTIFACT_STORE_ERROR


@pytest.mark.parametrize("text", ["nothing", '{"step":1}\n', '{"step":1,"loss":2,"colour":3}\n', "[1]\n"])
def test_a_file_that_does_not_read_is_refused(text: str) -> None:
    with pytest.raises(JobFailedError, match=r"evaluations\.jsonl"):
        TrainingLog.from_files(trained(5).files() | {"evaluations.jsonl": text}, 5)


# ---- jobs ----

OFTEN: dict[str, Any] = {"learning_rate": 5e-2, "eval_every_steps": 1, "checkpoint_every_steps": 1}


async def publish(job: Rig, folder: Path) -> bytes:
    """The weights that the job writes at its end, by the policy that it has by then."""
    await job.driver.train()
    await job.driver.export(folder, best=job.driver._plan.spec.publish is PublishPolicy.BEST)
    return (folder / WEIGHTS).read_bytes()


def best_of(job: Rig) -> int:
    best = job.driver.evals.best
    assert best is not None
    return best.step


async def test_the_best_weights_are_published_wherever_the_job_was_cut_off(
    model_folder: Path, rig: MakeRig, tmp_path: Path
) -> None:
    options = OFTEN | {"publish": PublishPolicy.BEST}
    async with running(model_folder) as client:
        async with rig(client, **options) as job:
            expected = await publish(job, tmp_path / "whole")
        best = best_of(job)
        assert 0 < best < TOTAL, [one.loss for one in job.evals]
        assert [one.step for one in job.evals] == list(range(TOTAL + 1))
        assert expected == (job.path(best) / WEIGHTS).read_bytes() != (job.path(TOTAL) / WEIGHTS).read_bytes()
        for step in (best - 1, best, best + 1, TOTAL):
            if step == 0:
                continue
            async with rig(client, resume=job.path(step), **options) as resumed:
                assert await publish(resumed, tmp_path / f"from{step}") == expected
            assert resumed.driver.evals == job.driver.evals
            for name in ("training_log.jsonl", "evaluations.jsonl"):
                assert (tmp_path / f"from{step}" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        async with rig(client, **OFTEN) as last:
            assert await publish(last, tmp_path / "last") != expected, "negative control: Always publishes the end"
    verify_folder(tmp_path / "whole")
    rows = [json.loads(line) for line in (tmp_path / "whole/evaluations.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(TOTAL + 1))
    assert {row["samples"] for row in rows} == {5}


async def test_a_stop_between_evaluation_and_publication_publishes_the_same(
    model_folder: Path, rig: MakeRig, tmp_path: Path
) -> None:
    """The job is stopped as soon as its best weights are to be kept, and as soon as it says that they are."""
    options = OFTEN | {"publish": PublishPolicy.BEST, "checkpoint_every_steps": 3}
    async with running(model_folder) as client:
        async with rig(client, **options) as whole:
            expected = await publish(whole, tmp_path / "whole")
        kept = sum(isinstance(one, KeepBest) for one in whole.commands)
        for nth in range(kept):
            async with rig(client, **options) as first:
                wanted = iter([False] * nth + [True] * 100)

                class Spy(list[Any]):
                    def append(self, one: Any, job: Rig = first, hit: Any = wanted) -> None:
                        super().append(one)
                        if isinstance(one, KeepBest) and next(hit):
                            job.driver.request_stop()

                first.commands = Spy()
                with pytest.raises(StopRequested):
                    await first.driver.train()
                await first.driver.stop()
            resume = None if not first.accepted else first.path(first.accepted[-1].step)
            async with rig(client, resume=resume, **options) as second:
                assert await publish(second, tmp_path / f"parts{nth}") == expected
            assert second.driver.evals == whole.driver.evals


async def test_patience_ends_a_job_at_the_same_step_wherever_it_was_cut_off(
    model_folder: Path, rig: MakeRig, tmp_path: Path
) -> None:
    async with running(model_folder) as client:
        async with rig(client, **OFTEN) as whole:
            await whole.driver.train()
        losses = [one.loss for one in whole.evals]
        patience = 1
        end = next(n for n in range(1, TOTAL + 1) if EvalLog(tuple(whole.evals[: n + 1])).since_best >= patience)
        assert 0 < end < TOTAL, losses
        async with rig(client, **OFTEN, patience=patience) as job:
            expected = await publish(job, tmp_path / "early")
        assert job.driver.state.step == end
        assert [one.loss for one in job.evals] == losses[: end + 1]
        assert job.accepted[-1].step == end
        assert expected == (whole.path(end) / WEIGHTS).read_bytes(), "the schedule is that of the whole job"
        for step in range(1, end + 1):
            async with rig(client, resume=job.path(step), **OFTEN, patience=patience) as resumed:
                assert await publish(resumed, tmp_path / f"from{step}") == expected
            assert resumed.driver.state == job.driver.state


async def test_a_policy_that_becomes_best_publishes_what_it_would_have_from_the_start(
    model_folder: Path, rig: MakeRig, tmp_path: Path
) -> None:
    async with running(model_folder) as client:
        async with rig(client, **OFTEN, publish=PublishPolicy.BEST) as whole:
            expected = await publish(whole, tmp_path / "whole")
        best = best_of(whole)
        async with rig(client, **OFTEN, publish=PublishPolicy.NEVER) as job:

            def change_after_the_best(record: EvalRecord) -> None:
                if record.step == best + 1:
                    job.driver.update(job.driver._plan.spec.model_copy(update={"publish": PublishPolicy.BEST}))

            job.driver._on_eval = change_after_the_best
            assert await publish(job, tmp_path / "changed") == expected
        async with rig(client, resume=job.path(best + 1), **OFTEN, publish=PublishPolicy.BEST) as resumed:
            assert await publish(resumed, tmp_path / "resumed") == expected


@pytest.mark.parametrize(
    ("kept", "loss", "beats"), [(None, 3.1, False), (None, 2.9, True), (8, 2.9, True), (4, 2.9, False)]
)
def test_weights_that_an_older_agent_did_not_keep_are_beaten_by_later_ones(
    kept: int | None, loss: float, beats: bool
) -> None:
    log = EvalLog((EvalRecord(0, 3.0), EvalRecord(4, 2.6), EvalRecord(8, 2.95)))
    assert log.beats_kept(loss, kept) is beats


def test_a_checkpoint_whose_best_weights_nothing_speaks_of_is_refused() -> None:
    log = trained(5)
    assert (log.check_best(4), log.check_best(None)) == (4, None)
    with pytest.raises(JobFailedError, match=r"best weights are of step 3, of which") as caught:
        log.check_best(3)
    assert caught.value.reason is FailedReason.ARTIFACT_STORE_ERROR


async def test_a_checkpoint_of_an_agent_that_kept_no_evaluations_goes_on(
    model_folder: Path, rig: MakeRig, tmp_path: Path
) -> None:
    shape: dict[str, Any] = {"rank": 1, "alpha": 2, "target_modules": ("q_proj",), "eval_every_steps": 3}
    async with running(model_folder) as client, rig(client, resume=OLD, **shape) as job:
        assert (job.driver.state.step, job.driver.state.eval_step) == (4, 3)
        assert [one.step for one in job.driver.evals.records] == [0, 3]
        await publish(job, tmp_path / "adapter")
        evaluated = {one.work.step for one in job.commands if isinstance(one, ForwardBackward)}
        saved = [one for one in job.commands if isinstance(one, SaveCheckpoint)]
    assert evaluated == {5, 6, 7, 8}
    assert [one.step for one in job.driver.evals.records] == [0, 3, 6, TOTAL]
    assert all("evaluations.jsonl" in one.files for one in saved)
    first = json.loads((tmp_path / "adapter/evaluations.jsonl").read_text().splitlines()[0])
    assert first == {"step": 0, "loss": pytest.approx(6.0478, abs=1e-3), "samples": None, "tokens": None}
