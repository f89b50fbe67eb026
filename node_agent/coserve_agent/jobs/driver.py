"""A finetuning job as a stream of engine commands: what a remote client would send, driven by a dataset's shards.

It keeps about two optimizer steps in flight, so the engine always has work, and holds no state that a checkpoint
does not carry.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from coserve_agent.chat.variables import FILE as RENDERING_FILE
from coserve_agent.concurrency import end
from coserve_agent.engine.client import JobChannel
from coserve_agent.engine.pass_bounds import PassBounds
from coserve_agent.errors import JobFailedError
from coserve_agent.jobs.evaluations import EvalLog, EvalRecord
from coserve_agent.jobs.inflight import Evaluation, OpenSteps
from coserve_agent.jobs.lora import lora_of
from coserve_agent.jobs.passes import check_length, passes_of, to_seqs
from coserve_agent.jobs.trainlog import DriverState, StepRecord, TrainingLog
from coserve_api.job_status import FailedReason
from coserve_contract.messages import BindingSpec
from coserve_contract.shards import Sample, Shard, shard_bytes
from coserve_engine.messages import (
    AdapterExported,
    BestKept,
    CheckpointDone,
    ExportAdapter,
    JobEvent,
    JobFailed,
    JobStarted,
    JobStopped,
    KeepBest,
    Pass,
    PassDone,
    PassMode,
    SaveCheckpoint,
    SetPriority,
    SetSlowdown,
    StartJob,
    StepDone,
    StopJob,
)

log = logging.getLogger(__name__)

STEPS_IN_FLIGHT = 2
EVAL_PASSES_IN_FLIGHT = 4
MAX_SKIPPED_IN_ROW = 5
UNSAVED_BYTES = 64 * 2**20
"""A checkpoint is due after so much data at the latest: what no checkpoint covers stays in Redis."""
# How long a stop waits for steps that are nearly done before it gives them up.
STOP_WAIT_S = 5.0


class ShardSource(Protocol):
    """Where a job's data comes from."""

    def get(self, number: int) -> Shard | None:
        """Training shard `number` if it is here; earlier ones are forgotten. Wakes the driver when it arrives."""

    async def eval_samples(self) -> Iterable[Sample]:
        """All held-out samples. Iterating may read a file."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the driver must know of a job. `engine_job` names it in the engine; `bounds` are its passes'; paths are
    absolute; `rendering` is the file that says how prompts of the adapter are written; `start` is the folder of the
    adapter that it goes on from, where its spec says so.
    """

    engine_job: str
    spec: BindingSpec
    total_steps: int
    max_length: int
    bounds: PassBounds
    base_model_name: str
    rendering: str
    checkpoint_path: Callable[[int], Path]
    start: Path | None = None


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that is durable and waits to be accepted."""

    step: int
    sha256: str


class StopRequested(Exception):  # noqa: N818 (no error: it unwinds the driver to where it stops)
    """The driver was asked to stop."""


class Driver:
    """Runs one job on the engine from a checkpoint to its end, or until it is asked to stop.

    Args:
        accept: called with each durable checkpoint; returns once it is accepted. Never called twice at once.
        on_step: hears every finished step and the totals after it.
        on_eval: hears every evaluation.
        pass_ids: numbers that are unique over the engine's life.
    """

    def __init__(
        self,
        plan: Plan,
        channel: JobChannel,
        shards: ShardSource,
        *,
        accept: Callable[[Saved], Awaitable[None]],
        on_step: Callable[[StepRecord, DriverState], None],
        pass_ids: Iterator[int],
        on_eval: Callable[[EvalRecord], None] = lambda record: None,
    ) -> None:
        self._plan = plan
        self._channel = channel
        self._shards = shards
        self._accept = accept
        self._on_step = on_step
        self._on_eval = on_eval
        self._pass_ids = pass_ids
        self._seq = itertools.count(1)
        self._log = TrainingLog()
        self._open = OpenSteps(plan.engine_job, plan.spec, plan.total_steps, plan.bounds, pass_ids)
        self._eval = Evaluation()
        self._changed = asyncio.Event()
        self._stop = False
        self._failure: Exception | None = None
        self._started: JobStarted | None = None
        self._stopped: JobStopped | None = None
        self._exported: AdapterExported | None = None
        self._best_kept: BestKept | None = None
        self.kept_step: int | None = None  # of the best evaluation, whose weights the engine keeps
        self._saving: int | None = None
        self._acceptance: asyncio.Task[None] | None = None
        self._pump: asyncio.Task[None] | None = None
        self.accepted_step = 0

    @property
    def state(self) -> DriverState:
        return self._log.state

    @property
    def evals(self) -> EvalLog:
        return self._log.evals

    @property
    def rank(self) -> int | None:
        """The adapter's, once the engine has begun."""
        return None if self._started is None else self._started.lora.rank

    def wake(self) -> None:
        """Something the driver may wait for has changed."""
        self._changed.set()

    def update(self, spec: BindingSpec) -> None:
        """Go on with what may change of a spec; a checkpoint that is due is due from the next step on."""
        if spec.priority != self._plan.spec.priority:
            self._channel.submit(SetPriority(self._plan.engine_job, spec.weight))
        self._channel.submit(SetSlowdown(spec.max_slowdown_percent))
        self._plan = replace(self._plan, spec=spec)

    def request_stop(self) -> None:
        self._stop = True
        self.wake()

    async def start(self, resume: Path | None) -> None:
        """Create the training state in the engine.

        Raises:
            JobFailedError: the engine refuses it.
        """
        plan, spec = self._plan, self._plan.spec
        folder = None if resume is None else str(resume)
        self._pump = asyncio.create_task(self._read_events())
        self._channel.submit(SetSlowdown(spec.max_slowdown_percent))
        self._channel.submit(StartJob(plan.engine_job, lora_of(spec, plan.start), spec.seed, folder, spec.weight))
        await self._until(lambda: self._started is not None, stoppable=False)
        assert self._started is not None
        if resume is not None:
            self._log = TrainingLog.from_files(self._started.files, self._started.step)
            self.kept_step = self._log.check_best(self._started.best_step)
            self.accepted_step = self._started.step
        self._seq = itertools.count(self._started.seq_no + 1)

    async def train(self) -> None:
        """Run all steps that are left, evaluate before the first, after the last and as often between as the job asks,
        and end early where it has no more patience; the last checkpoint is accepted at the end.

        Raises:
            StopRequested, JobFailedError, EngineGoneError.
        """
        total, unsaved_bytes = self._plan.total_steps, 0
        for step in range(self.state.step + 1, total + 1):
            if self._evaluates_after(step - 1):
                await self._evaluate(step - 1)
                if self._patience_is_over():
                    total = step - 1
                    break
            shard = await self._next_shard(step)
            await self._until(lambda: len(self._open) < STEPS_IN_FLIGHT)
            for command in self._open.begin(step, shard, self._seq):
                self._channel.submit(command)
            unsaved_bytes += shard_bytes(len(shard.samples), shard.tokens)
            due = step % self._plan.spec.checkpoint_every_steps == 0 or unsaved_bytes >= UNSAVED_BYTES
            if due and step < total:
                await self._until(lambda: not self._open)
                await self._save()
                unsaved_bytes = 0
        await self._evaluate(total)
        await self._settle_acceptance(stoppable=True)  # where patience ended it, one of this step may be on its way
        if self.accepted_step < self.state.step:
            await self._save()
        await self._settle_acceptance(stoppable=True)

    async def export(self, path: Path, *, best: bool = False) -> str:
        """Write the adapter, or with `best` that of `kept_step`, as PEFT folder; returns its manifest's sha256."""
        plan, files, number = self._plan, {**self._log.logs(), RENDERING_FILE: self._plan.rendering}, next(self._seq)
        self._channel.submit(ExportAdapter(plan.engine_job, number, str(path), plan.base_model_name, files, best))
        await self._until(lambda: self._exported is not None)
        assert self._exported is not None
        return self._exported.sha256

    async def stop(self) -> None:
        """Save what is done, have it accepted, and drop the job from the engine."""
        try:
            async with asyncio.timeout(STOP_WAIT_S):
                await self._until(lambda: not self._open, stoppable=False)
        except TimeoutError:
            log.info("job %s: gives up the steps that are under way", self._plan.spec.job_name)
        await self._settle_acceptance(stoppable=False)
        step = self.state.step
        if step <= self.accepted_step:
            await self.drop()
            return
        self._channel.submit(StopJob(self._plan.engine_job, str(self._plan.checkpoint_path(step)), self._log.files()))
        await self._until(lambda: self._stopped is not None, stoppable=False)
        stopped = self._stopped
        if stopped is None or stopped.checkpoint is None or stopped.step != step:
            # A step ended between the last event and the stop: its log line is missing, so this is no checkpoint.
            log.info(
                "job %s: the last step is not saved; it is done again from step %d",
                self._plan.spec.job_name,
                self.accepted_step,
            )
            return
        await self._accept(Saved(step, stopped.checkpoint))
        self.accepted_step = step

    async def drop(self) -> None:
        """Forget the job in the engine; nothing is written."""
        self._channel.submit(StopJob(self._plan.engine_job))
        await self._until(lambda: self._stopped is not None, stoppable=False)

    async def close(self) -> None:
        """End the driver's own tasks."""
        await end(*(task for task in (self._pump, self._acceptance) if task is not None))

    # ---- steps ----

    async def _next_shard(self, step: int) -> Shard:
        await self._until(lambda: self._shards.get(step) is not None)
        shard = self._shards.get(step)
        assert shard is not None
        check_length(shard.samples, self._plan.max_length)
        return shard

    def _evaluates_after(self, step: int) -> bool:
        every = self._plan.spec.eval_every_steps
        return step == 0 or (every > 0 and step % every == 0)

    async def _evaluate(self, step: int) -> None:
        """The mean loss over the held-out samples once `step` steps are done; nothing where there are none, or where a
        checkpoint brought it back.
        """
        await self._until(lambda: not self._open)
        if self.state.eval_step == step:
            return
        parts = passes_of(await self._shards.eval_samples(), self._plan.bounds)
        self._eval = Evaluation()
        for micro in itertools.count():
            part = await asyncio.to_thread(next, parts, ())
            if not part:
                break
            check_length(part, self._plan.max_length)
            await self._until(lambda: len(self._eval.pending) < EVAL_PASSES_IN_FLIGHT)
            seqs = to_seqs(part, 1.0)
            work = Pass(next(self._pass_ids), self._plan.engine_job, step, micro, seqs, PassMode.EVAL)
            self._channel.submit(self._eval.begin(work, next(self._seq)))
        if not micro:
            return
        await self._until(lambda: not self._eval.pending)
        record = self._eval.record(step)
        if step > 0 and self._plan.spec.eval_every_steps > 0 and self.evals.beats_kept(record.loss, self.kept_step):
            await self._keep_best()  # whatever the policy is: it may change as long as the job runs
            self.kept_step = step
        self._log.note_eval(record)
        self._on_eval(record)
        log.info("job %s: eval loss %s at step %d", self._plan.spec.job_name, record.loss, step)

    async def _keep_best(self) -> None:
        """Not to be stopped in between: a checkpoint would have best weights that its log knows nothing of."""
        number = next(self._seq)
        self._channel.submit(KeepBest(self._plan.engine_job, number))
        await self._until(lambda: self._best_kept is not None and self._best_kept.seq_no == number, stoppable=False)

    def _patience_is_over(self) -> bool:
        patience = self._plan.spec.patience
        return patience is not None and self.evals.since_best >= patience

    # ---- checkpoints ----

    async def _save(self) -> None:
        """Begin a checkpoint of the current step, once the one before is accepted; training goes on meanwhile."""
        await self._settle_acceptance(stoppable=True)
        self._saving = self.state.step
        path = self._plan.checkpoint_path(self._saving)
        self._channel.submit(SaveCheckpoint(self._plan.engine_job, next(self._seq), str(path), self._log.files()))

    async def _settle_acceptance(self, *, stoppable: bool) -> None:
        await self._until(lambda: self._saving is None, stoppable=stoppable)

    async def _accept_saved(self, event: CheckpointDone) -> None:
        try:
            await self._accept(Saved(event.step, event.sha256))
            self.accepted_step = event.step
        except Exception as error:
            self._failure = self._failure or error
        self._saving = None
        self.wake()

    # ---- events ----

    async def _until(self, condition: Callable[[], bool], *, stoppable: bool = True) -> None:
        while True:
            self._changed.clear()
            if self._failure is not None:
                raise self._failure
            if stoppable and self._stop:
                raise StopRequested
            if condition():
                return
            await self._changed.wait()

    async def _read_events(self) -> None:
        try:
            while True:
                self._handle(await self._channel.next_event())
                self.wake()
        except Exception as error:
            self._failure = self._failure or error
            self.wake()

    def _handle(self, event: JobEvent) -> None:
        match event:
            case JobStarted():
                self._started = event
            case PassDone(mode=PassMode.EVAL):
                self._eval.on_pass(event)
            case PassDone():
                self._open.on_pass(event)
            case StepDone():
                self._on_step_done(event)
            case BestKept():
                self._best_kept = event
            case CheckpointDone():
                self._acceptance = asyncio.create_task(self._accept_saved(event))
            case AdapterExported():
                self._exported = event
            case JobStopped():
                self._stopped = event
            case JobFailed():
                raise JobFailedError(_REASONS.get(event.code, FailedReason.INTERNAL_ERROR), event.message)

    def _on_step_done(self, event: StepDone) -> None:
        record = self._open.on_optim(event)
        self._log.add(record)
        self._on_step(record, self.state)
        if self.state.skipped_in_row >= MAX_SKIPPED_IN_ROW:
            raise JobFailedError(
                FailedReason.TRAINING_DIVERGED,
                f"loss or gradient was not finite in {MAX_SKIPPED_IN_ROW} steps in a row, up to step {record.step}; "
                "lower training.learningRate, raise warmupSteps, or look at the data",
            )


_REASONS = {
    "artifact_store": FailedReason.ARTIFACT_STORE_ERROR,
    "invalid_checkpoint": FailedReason.ARTIFACT_STORE_ERROR,
    "other_arithmetic": FailedReason.ENDPOINT_REJECTED,
    "invalid_adapter": FailedReason.INVALID_ADAPTER,
}
