"""All finetuning jobs of an engine: which run, which are being loaded, and who computes next.

Jobs share nothing but the device: each has its own parameters, moments and gradient, so a job's bits do not depend on
its neighbours. Passes are served by claim (`fair`), and the job with the least claim gives up its passes first.
"""

from __future__ import annotations

from collections.abc import Callable

from coserve_engine.config import EngineConfig
from coserve_engine.errors import AdapterFolderError, JobError, OtherArithmeticError
from coserve_engine.formats.deferred import FileError, FileWork
from coserve_engine.job_messages import (
    JobCommand,
    JobEvent,
    JobFailed,
    JobStarted,
    SetPriority,
    StartJob,
    StopJob,
)
from coserve_engine.model.executor import Executor
from coserve_engine.model.passes import PassState
from coserve_engine.scheduler.fair import FairShare
from coserve_engine.training.beginning import Beginning, begin
from coserve_engine.training.job_limits import check_priority, check_start
from coserve_engine.training.jobs import Job


def _code(error: FileError) -> str:
    """Of JobFailed, where a job cannot begin."""
    if isinstance(error, AdapterFolderError):
        return "invalid_adapter"
    return "other_arithmetic" if isinstance(error, OtherArithmeticError) else "invalid_checkpoint"


class JobTable:
    """`submit` commands, `advance` before and after an iteration; events go to `say`."""

    def __init__(
        self, config: EngineConfig, executor: Executor, files: FileWork, say: Callable[[JobEvent], None]
    ) -> None:
        self._config, self._executor, self._files, self._say = config, executor, files, say
        self.running: dict[str, Job] = {}
        self._held: dict[str, list[JobCommand]] = {}
        """What came for a job while its state is read, or since it is to stop while a step is under way."""
        self._fair = FairShare()

    @property
    def idle(self) -> bool:
        return all(job.idle for job in self.running.values())

    # ---- commands ----

    def submit(self, command: JobCommand) -> None:
        """Accept a command; what it cannot do is said by an event, never raised."""
        if command.job in self._held:
            self._held[command.job].append(command)
            return
        try:
            if isinstance(command, StartJob):
                self._start(command)
                return
            job = self.running.get(command.job)
            if isinstance(command, SetPriority):
                check_priority(command.priority)
                self._fair.reweigh(command.job, command.priority)
            elif job is None:
                message = f"job {command.job} does not run here"
                self._say(JobFailed(command.job, "invalid_command", message))
            elif isinstance(command, StopJob) and not job.settled:
                self._held[command.job] = [command]
            elif isinstance(command, StopJob):
                for event in job.settle():
                    self._say(event)
                self._forget(command.job)
                self._write(command.job, job.stop(command))
            else:
                if job.idle:
                    self._fair.wake(command.job)
                job.submit(command)
        except JobError as error:
            self._fail(command.job, error.code, str(error))

    def _start(self, command: StartJob) -> None:
        if not self._config.finetuning:
            raise JobError(
                "invalid_command", "finetuning is disabled on this endpoint; set finetuning.policy to Allowed"
            )
        if command.job in self.running:
            message = f"job {command.job} runs already; stop it first"
            self._say(JobFailed(command.job, "job_running", message))
            return
        check_start(command, self._config.max_rank)
        self._held[command.job] = []

        def started(beginning: Beginning) -> None:
            layout, state, files = beginning
            self.running[command.job] = Job(command, self._executor, beginning)
            self._fair.join(command.job, command.priority)
            best_step = None if state.best is None else state.best.step
            self._say(JobStarted(command.job, state.step, state.seq_no, files, layout.spec, best_step))
            self._resubmit(command.job)

        def failed(error: FileError) -> None:
            self._say(JobFailed(command.job, _code(error), str(error)))
            self._resubmit(command.job)

        self._files.defer(lambda: begin(command, self._executor), started, failed)

    def _resubmit(self, job: str) -> None:
        for command in self._held.pop(job):
            self.submit(command)

    def _write(self, job: str, work: Callable[[], JobEvent]) -> None:
        def failed(error: FileError) -> None:
            message = f"{error}; check that the artifact store is mounted, writable and not full"
            self._fail(job, "artifact_store", message)

        self._files.defer(work, self._say, failed)

    def _fail(self, job: str, code: str, message: str) -> None:
        self._forget(job)
        self._say(JobFailed(job, code, message))

    def _forget(self, job_id: str) -> None:
        job = self.running.pop(job_id, None)
        self._fair.leave(job_id)
        while job is not None and job.drop_youngest():
            pass
        if not self.running:
            self._executor.buffers.clear()

    # ---- an iteration ----

    def advance(self, *, may_open: bool) -> None:
        """Commit and begin what can be. `may_open`: pages may be taken for new passes.

        A job whose next pass lacks pages that other passes hold keeps jobs of less claim from opening more, or they
        would take each page that comes free.
        """
        for name in [name for name in self._held if name in self.running and self.running[name].settled]:
            self._resubmit(name)
        for name in self._by_claim():
            job = self.running[name]
            if name in self._held:
                continue
            for event in job.advance(self._write, may_open=may_open):
                self._say(event)
            ledger = self._executor.ledger
            if 0 < job.pages_wanted <= ledger.free_pages + ledger.held_by("pass:"):
                may_open = False

    def passes(self) -> tuple[PassState, ...]:
        """Live passes with work left, in the order in which they are to be served: by claim of the job, then oldest
        first.
        """
        live = (state for name in self._by_claim() for _, state in self.running[name].live.values())
        return tuple(state for state in live if not state.done)  # what came of one may be on its way

    def charge(self, pass_id: int, work: float) -> None:
        """`work` rows x layers were computed for a live pass."""
        self._fair.charge(self._executor.passes[pass_id].work.job, work)

    def drop_youngest(self) -> bool:
        """Give up a pass of the job with the least claim. False where none is live."""
        return any(self.running[name].drop_youngest() for name in reversed(self._by_claim()))

    def _by_claim(self) -> list[str]:
        return self._fair.order(name for name, job in self.running.items() if not job.idle)
