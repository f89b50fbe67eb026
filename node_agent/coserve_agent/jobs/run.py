"""One binding of one job on this agent: lease, checkpoint, data, driver, result, and every way this can end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

from coserve_agent.adapters.live import Training
from coserve_agent.chat.variables import rendering_file
from coserve_agent.concurrency import alongside
from coserve_agent.errors import AgentError, EngineGoneError, FencedError, JobFailedError
from coserve_agent.jobs.checkpoints import CheckpointStore
from coserve_agent.jobs.driver import Driver, Plan, Saved, StopRequested
from coserve_agent.jobs.evaluations import EvalRecord
from coserve_agent.jobs.held_out import HeldOut
from coserve_agent.jobs.lease import LeaseKeeper
from coserve_agent.jobs.progress import ProgressMeter
from coserve_agent.jobs.resumed import check_resumed
from coserve_agent.jobs.shard_reader import ShardReader
from coserve_agent.jobs.surroundings import Surroundings
from coserve_agent.jobs.trainlog import DriverState, StepRecord
from coserve_api.errors import MessageError
from coserve_api.job import PublishPolicy
from coserve_api.job_status import FailedReason
from coserve_contract.away import STORE_AWAY
from coserve_contract.messages import AdapterFiles, Binding, Checkpoint, Completed, Failed, FeedStatus, Released
from coserve_contract.scripts import Refused
from coserve_engine.errors import CheckpointError
from coserve_engine.formats.folders import digest, verify_folder
from coserve_engine.formats.opened import check_beneath
from coserve_engine.messages import StopJob

log = logging.getLogger(__name__)

PROGRESS_S = 1.0
FEED_POLL_S = 0.5
# A job's own mistakes, by which every attempt would end.
FINAL = (
    FailedReason.DATASET_NOT_FOUND,
    FailedReason.INVALID_DATASET,
    FailedReason.INVALID_ADAPTER,
    FailedReason.INVALID_CHECKPOINT,
    FailedReason.TRAINING_DIVERGED,
)
# The artifact store or the engine may recover soon; else the job is given back, and the operator has it tried again.
RETRIED = (FailedReason.ARTIFACT_STORE_ERROR, FailedReason.INTERNAL_ERROR)
RETRY_WAITS_S = (2.0, 10.0)


class JobRun:
    """Runs `binding` to its end. Cancelling `run` drops the job without writing anything."""

    def __init__(self, around: Surroundings, binding: Binding) -> None:
        self._around = around
        self._spec = binding.spec
        self.name = binding.spec.job_name
        self.job = binding.spec.job_uid
        self.epoch = binding.epoch
        self._lease = LeaseKeeper(around.fencing, self.job, self.epoch, now_s=around.now_s)
        self._checkpoints = CheckpointStore(around.artifacts, self.job, self.epoch, self._spec.checkpoint_keep)
        self._accepted: Checkpoint | None = None
        self._driver: Driver | None = None
        self._held_out: HeldOut | None = None
        self._stop_message: str | None = None
        self._trains_as: str | None = None
        """What the engine calls the job, while it has it."""
        self.step = 0 if binding.resume is None else binding.resume.step

    @property
    def training(self) -> Training | None:
        """What can be served of the job now."""
        if self._trains_as is None:
            return None
        return Training(self._spec.adapter_name, self._trains_as, self.step, self._spec.template_variables)

    def update(self, binding: Binding) -> None:
        """Take over what has changed in the binding since, of what may change while the job runs."""
        live = binding.spec.live
        if live == self._spec.live:
            return
        log.info("job %s: goes on from step %d with %s", self.name, self.step, live)
        self._spec = self._spec.model_copy(update=live)
        self._checkpoints.keep = self._spec.checkpoint_keep
        if self._driver is not None and self._around.engine.alive:
            self._driver.update(self._spec)

    def request_stop(self, message: str) -> None:
        """Save, have it accepted, give the job back."""
        if self._stop_message is None:
            log.info("job %s: stops at step %d: %s", self.name, self.step, message)
            self._stop_message = message
            if self._driver is not None:
                self._driver.request_stop()

    async def run(self) -> None:
        """Until the job is done, given back, failed, or another's."""
        try:
            self._accepted = await self._lease.take()
            await alongside(self._attempts(), self._lease.run())
        except FencedError as error:
            log.warning("job %s: dropped, nothing more is written: %s", self.name, error)
        except EngineGoneError as error:
            log.error("job %s: the engine stopped: %s", self.name, error)
        finally:
            self._around.metrics.forget_job(self.name)

    async def _attempts(self) -> None:
        for attempt, wait_s in enumerate((*RETRY_WAITS_S, None), start=1):
            try:
                await self._guarded(f"{self.job}/e{self.epoch}/{attempt}")
                return
            except StopRequested:
                await self._give_back()
                return
            except JobFailedError as error:
                if error.reason in FINAL:
                    await self._fail(error)
                    return
                if self._stop_message is not None:
                    log.error("job %s: could not be saved, goes on from the last checkpoint: %s", self.name, error)
                    await self._give_back()
                    return
                if wait_s is None or error.reason not in RETRIED:
                    await self._give_back(error)
                    return
                log.warning("job %s: tries again in %g s: %s: %s", self.name, wait_s, error.reason, error)
            await asyncio.sleep(wait_s)

    async def _guarded(self, engine_job: str) -> None:
        """An attempt; a mistake of our own ends it visibly instead of leaving the job bound to nobody's work."""
        try:
            await self._attempt(engine_job)
        except (AgentError, StopRequested):
            raise
        except Exception as error:
            log.exception("job %s: the agent's own mistake", self.name)
            raise JobFailedError(FailedReason.INTERNAL_ERROR, f"the agent's own mistake: {error!r}") from None

    async def _attempt(self, engine_job: str) -> None:
        around, spec = self._around, self._spec
        if spec.rank is not None and spec.rank > around.max_rank:
            raise JobFailedError(
                FailedReason.RANK_TOO_LARGE,
                f"adapter.rank is {spec.rank}; the endpoint allows up to {around.max_rank} (finetuning.maxRank)",
            )
        feed = await self._feed()
        checkpoint = await self._resume_from()
        start = None if spec.start is None else around.artifacts / spec.start.path
        if start is not None and checkpoint is None:
            await self._verify_start(start)
        if checkpoint is not None and spec.start is not None and spec.start.path == checkpoint.path:
            step, total = checkpoint.step, feed.total_steps
            folder = around.artifacts / checkpoint.path
            await asyncio.to_thread(check_resumed, folder, spec.start, around.model_path, step, total)
        plan = Plan(
            engine_job=engine_job,
            spec=self._spec,  # which may have changed since
            total_steps=feed.total_steps,
            max_length=around.max_model_length,
            bounds=around.engine.pass_bounds,
            base_model_name=around.base_model,
            rendering=rendering_file(spec.template_variables, around.digest),
            checkpoint_path=lambda step: around.artifacts / self._checkpoints.relative(step),
            start=start,
        )
        meter = ProgressMeter(self.epoch, feed.total_steps, around.now_s)

        def on_step(record: StepRecord, state: DriverState) -> None:
            self.step = state.step
            meter.add(state, record.lr)
            around.metrics.on_step(self.name, state.step, record.loss, record.tokens)
            around.observe(self.job, record)

        def on_eval(record: EvalRecord) -> None:
            around.metrics.on_evaluation(self.name, record.loss)
            around.observe(self.job, record)

        channel = around.engine.open_job(engine_job)
        self._held_out = HeldOut(self._checkpoints.root, self.epoch, feed)
        reader = ShardReader(
            around.store,
            self.job,
            after=0 if checkpoint is None else checkpoint.cursor,
            total=feed.total_steps,
            held_out=self._held_out,
            windowed=feed.windowed,
            digest=around.digest,
        )
        driver = Driver(
            plan, channel, reader, accept=self._accept, on_step=on_step, pass_ids=around.pass_ids, on_eval=on_eval
        )
        reader.on_arrival = driver.wake
        self._driver = driver  # from here on `update` reaches the plan
        try:
            await reader.look_for_held_out()
            await driver.start(None if checkpoint is None else around.artifacts / checkpoint.path)
            self.step, self._trains_as = driver.state.step, engine_job
            meter.begin(driver.state)
            for record in driver.evals.records[-1:]:
                around.metrics.on_evaluation(self.name, record.loss)
            log.info("job %s: epoch %d, from step %d of %d", self.name, self.epoch, self.step, feed.total_steps)
            if self._stop_message is not None:
                driver.request_stop()
            await self._lease.write(self._progress(driver, reader, meter))  # an attempt before may have told of more
            await alongside(self._drive(driver), reader.run(), self._report(driver, reader, meter))
        finally:
            self._driver = self._trains_as = None
            await driver.close()
            channel.close()
            if around.engine.alive:
                around.engine.submit(StopJob(engine_job))

    async def _drive(self, driver: Driver) -> None:
        try:
            await driver.train()
            policy = self._spec.publish
            adapter = await self._publish(driver, policy)
        except StopRequested:
            await driver.stop()
            raise
        state = driver.state
        result = Completed(
            epoch=self.epoch,
            step=state.step,
            tokens=state.tokens,
            adapter=adapter,
            publish=policy,
            loss=state.loss,
            eval_loss_initial=state.eval_loss_initial,
            eval_loss=state.eval_loss,
            evaluations=driver.evals.last(),
            best=driver.evals.best_message(),
            rank=driver.rank,
        )
        await self._finish(result)
        log.info("job %s: completed after %d steps and %d tokens", self.name, state.step, state.tokens)

    async def _publish(self, driver: Driver, policy: PublishPolicy) -> AdapterFiles | None:
        spec = self._spec
        if policy is PublishPolicy.NEVER:
            return None
        if policy is PublishPolicy.IF_EVAL_IMPROVES and not driver.state.improved:
            log.info("job %s: not published: the evaluation loss did not fall", self.name)
            return None
        if policy is PublishPolicy.BEST and driver.kept_step is None:
            log.info("job %s: not published: no evaluation loss was below the initial one", self.name)
            return None
        path = f"adapters/{self._around.endpoint_uid}/{spec.adapter_name}/v{spec.adapter_number}"
        sha256 = await driver.export(self._around.artifacts / path, best=policy is PublishPolicy.BEST)
        return AdapterFiles(name=spec.adapter_name, number=spec.adapter_number, path=path, sha256=sha256)

    # ---- checkpoints ----

    async def _verify_start(self, folder: Path) -> None:
        """The adapter to go on from is the version that the operator chose, or lies in its volume, behind no link."""
        assert self._spec.start is not None
        sha256, artifacts = self._spec.start.sha256, self._around.artifacts
        if sha256 is None:
            root = artifacts if folder.is_relative_to(artifacts) else Path(*folder.parts[:2])  # where it is mounted
            try:
                await asyncio.to_thread(check_beneath, root, folder)
            except FileNotFoundError:
                pass  # its volume may come back: see below
            except OSError as error:
                raise JobFailedError(FailedReason.INVALID_ADAPTER, f"adapter.from: {error}") from None
        try:
            if sha256 is None:
                await asyncio.to_thread(_read, folder)
            else:
                await asyncio.to_thread(verify_folder, folder, sha256, artifacts)
        except (CheckpointError, OSError) as error:
            raise JobFailedError(
                FailedReason.ARTIFACT_STORE_ERROR,
                f"adapter.from: {folder} cannot be used: {error}; restore the folder or its volume, or name another",
            ) from None

    async def _resume_from(self) -> Checkpoint | None:
        """The accepted checkpoint, or an older one if that is corrupt, in which case Redis is told."""
        checkpoint = await self._checkpoints.choose(self._accepted)
        if checkpoint != self._accepted:
            await self._lease.write(lambda: self._around.fencing.rewind(self.job, self.epoch, checkpoint))
            self._accepted = checkpoint
        return checkpoint

    async def _accept(self, saved: Saved) -> None:
        checkpoint = Checkpoint(
            step=saved.step,
            cursor=saved.step,
            epoch=self.epoch,
            path=self._checkpoints.relative(saved.step),
            sha256=saved.sha256,
        )
        refused = await self._lease.write(
            lambda: self._around.fencing.accept_checkpoint(self.job, self.epoch, checkpoint)
        )
        if refused is not None:
            log.warning("job %s: checkpoint of step %d: %s", self.name, saved.step, refused)
            return
        self._accepted = checkpoint
        await self._checkpoints.accepted(saved.step)
        log.info("job %s: checkpoint of step %d accepted", self.name, saved.step)

    # ---- what is said in Redis ----

    async def _feed(self) -> FeedStatus:
        """What the feeder says of the data, once it says it. An error of the feeder is the operator's to act on."""
        while True:
            if self._stop_message is not None:
                raise StopRequested
            try:
                feed = await self._around.store.feed(self.job)
            except (*STORE_AWAY, MessageError) as error:
                log.warning("job %s: waits for the feeder: %s", self.name, error)
                feed = None
            if feed is not None and feed.total_steps > 0 and feed.error is None:
                return feed
            await asyncio.sleep(FEED_POLL_S)

    async def _report(self, driver: Driver, reader: ShardReader, meter: ProgressMeter) -> None:
        while True:
            reader.kept_more.clear()
            await self._lease.write_now(self._progress(driver, reader, meter))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.kept_more.wait(), PROGRESS_S)

    def _progress(
        self, driver: Driver, reader: ShardReader, meter: ProgressMeter
    ) -> Callable[[], Awaitable[Refused | None]]:
        """The write that says how far the job is now."""
        rewound = self._checkpoints.rewound[:2048]
        progress = meter.report(driver.state, driver.evals, reader.last_read, rewound, reader.eval_cursor)
        return partial(self._around.fencing.report_progress, self.job, progress)

    async def _give_back(self, error: JobFailedError | None = None) -> None:
        step = 0 if self._accepted is None else self._accepted.step
        reason, message = (None, self._stop_message or "") if error is None else (error.reason, str(error))
        result = Released(epoch=self.epoch, step=step, message=message[:2048], reason=reason)
        await self._lease.write(lambda: self._around.fencing.finish(self.job, result))
        log.info("job %s: given back at step %d%s", self.name, step, f": {reason}: {message}" if reason else "")

    async def _fail(self, error: JobFailedError) -> None:
        log.error("job %s: failed: %s: %s", self.name, error.reason, error)
        await self._finish(Failed(epoch=self.epoch, reason=error.reason, message=str(error)[:2048]))

    async def _finish(self, result: Completed | Failed) -> None:
        await self._lease.write(lambda: self._around.fencing.finish(self.job, result))
        if self._held_out is not None:
            with contextlib.suppress(OSError):
                await asyncio.to_thread(self._held_out.remove)


def _read(folder: Path) -> None:
    """Read a folder that has no checksums: what is wrong with its volume is no mistake of the job's. Raises OSError."""
    for path in folder.iterdir():
        if path.is_file():
            digest(path)
