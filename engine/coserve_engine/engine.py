"""The synchronous engine: commands in, events out, one iteration a step. It reads no clock but the injected one."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import singledispatchmethod
from pathlib import Path

import torch

from coserve_engine.artifacts import read_peft_config, read_peft_weights
from coserve_engine.calibrate import calibrate
from coserve_engine.config import EngineConfig
from coserve_engine.cost import CostModel
from coserve_engine.errors import AdapterFolderError, CheckpointError, JobError, RequestError
from coserve_engine.executor import Executor
from coserve_engine.jobs import Job, check_lora
from coserve_engine.load import Demand, FinetuneTime, saturation_percent
from coserve_engine.lora import LoraWeights
from coserve_engine.messages import (
    AdapterFailed,
    AdapterLoaded,
    AdapterVersion,
    AddRequest,
    Cancel,
    Command,
    EngineReady,
    Event,
    ExportAdapter,
    ForwardBackward,
    IterationDone,
    JobFailed,
    JobStarted,
    LoadAdapter,
    LoadReport,
    OptimStep,
    RequestFailed,
    SaveCheckpoint,
    Shutdown,
    StartJob,
    StopJob,
    TokenBatch,
    UnloadAdapter,
)
from coserve_engine.passes import PassState
from coserve_engine.plan import Kind, PassView, Plan, View
from coserve_engine.probe import probe_row_invariance
from coserve_engine.requests import RequestTable
from coserve_engine.sampling import sample
from coserve_engine.schedule import decide, forward_work, unit_work

LOAD_REPORT_S = 0.25


@dataclass(slots=True)
class _Deferred:
    """Work on files in another thread: what to do with its event, and whose failure it would be."""

    future: Future[Event]
    then: Callable[[], None]
    failed: Callable[[Exception], Event]


class Engine:
    """One engine. `submit` commands, call `step` while not `idle`, deliver the events it returns."""

    def __init__(self, config: EngineConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config, self._clock = config, clock
        self.executor = Executor(config)
        self.requests = RequestTable(config, self.executor.model, self.executor.ledger, self.executor.cache.scrub)
        self.jobs: dict[str, Job] = {}
        self.cost = CostModel()
        self.closed = False
        self._adapters: dict[AdapterVersion, LoraWeights] = {}
        self._events: list[Event] = []
        self._deferred: list[_Deferred] = []
        self._files = ThreadPoolExecutor(1, "files")
        self._finetune = FinetuneTime()
        self._plan_id = 0
        self._last_report = -1.0
        self._last_step_end: float | None = None

    def ready(self) -> EngineReady:
        """Calibrate the latency model; the first thing to call."""
        e = self.executor
        notes = calibrate(e, self.cost, self._clock)
        odd = probe_row_invariance(e.device, e.dtype, e.numerics)
        if odd:
            notes += (
                f"rows of a GEMM depend on the number of rows for {odd}: results are not bit-exact on this machine",
            )
        return EngineReady(e.model.vocab_size, self.config.max_model_length, e.ledger.total, e.numerics.page, notes)

    @property
    def idle(self) -> bool:
        """Nothing to compute and nothing to wait for but commands."""
        busy = self.requests.running or self.requests.waiting or self._deferred or self._events
        return not busy and all(job.idle for job in self.jobs.values())

    # ---- commands ----

    def submit(self, command: Command) -> None:
        """Accept a command; what it cannot do is said by an event, never raised."""
        self._accept(command)

    @singledispatchmethod
    def _accept(self, command: Command) -> None:
        raise TypeError(f"not a command: {command!r}")

    @_accept.register
    def _(self, command: AddRequest) -> None:
        weights = None
        try:
            if command.adapter is not None:
                weights = self._adapters.get(command.adapter)
                if weights is None:
                    raise RequestError(
                        "unknown_adapter", f"adapter version {command.adapter} is not loaded; load it first"
                    )
            self.requests.add(command, weights, self._finetune.total_s)
        except RequestError as error:
            self._events.append(RequestFailed(command.request_id, error.code, str(error)))

    @_accept.register
    def _(self, command: Cancel) -> None:
        self.requests.cancel(command.request_id)

    @_accept.register
    def _(self, command: LoadAdapter) -> None:
        loaded: list[LoraWeights] = []

        def load() -> Event:
            folder, e = Path(command.path), self.executor
            layout = e.layout(read_peft_config(folder, self.config.max_rank))
            flat = read_peft_weights(folder, layout, e.dtype).to(e.device)
            loaded.append(LoraWeights(layout.spec.scale, layout.views(flat)))
            return AdapterLoaded(command.version)

        self._defer(
            load,
            then=lambda: self._adapters.__setitem__(command.version, loaded[0]),
            failed=lambda error: AdapterFailed(command.version, str(error)),
        )

    @_accept.register
    def _(self, command: UnloadAdapter) -> None:
        self._adapters.pop(command.version, None)  # running requests keep their reference

    @_accept.register
    def _(self, command: StartJob) -> None:
        try:
            if not self.config.finetuning:
                raise JobError(
                    "invalid_command", "finetuning is disabled on this endpoint; set finetuning.policy to Allowed"
                )
            if command.job in self.jobs:
                raise JobError("invalid_command", f"job {command.job} runs already")
            check_lora(command.lora, self.config.max_rank)
            job = Job(command, self.executor)
        except JobError as error:
            self._events.append(JobFailed(command.job, error.code, str(error)))
        except CheckpointError as error:
            self._events.append(JobFailed(command.job, "invalid_checkpoint", str(error)))
        else:
            self.jobs[command.job] = job
            self._events.append(JobStarted(command.job, job.step, job.seq_no, job.files))

    @_accept.register(ForwardBackward)
    @_accept.register(OptimStep)
    @_accept.register(SaveCheckpoint)
    @_accept.register(ExportAdapter)
    def _(self, command: ForwardBackward | OptimStep | SaveCheckpoint | ExportAdapter) -> None:
        job = self.jobs.get(command.job)
        if job is None:
            self._events.append(JobFailed(command.job, "invalid_command", f"job {command.job} does not run here"))
            return
        try:
            job.submit(command)
        except JobError as error:
            self._fail(command.job, error.code, str(error))

    @_accept.register
    def _(self, command: StopJob) -> None:
        job = self.jobs.pop(command.job, None)
        if job is None:
            self._events.append(JobFailed(command.job, "invalid_command", f"job {command.job} does not run here"))
            return
        self._defer_job(command.job, job.stop(command))

    @_accept.register
    def _(self, command: Shutdown) -> None:
        self.closed = True

    # ---- files ----

    def _defer(self, work: Callable[[], Event], then: Callable[[], None], failed: Callable[[Exception], Event]) -> None:
        self._deferred.append(_Deferred(self._files.submit(work), then, failed))

    def _defer_job(self, job: str, work: Callable[[], Event]) -> None:
        self._defer(work, then=lambda: None, failed=lambda error: self._drop_job(job, error))

    def _drop_job(self, job: str, error: Exception) -> Event:
        self._forget(job)
        return JobFailed(
            job, "artifact_store", f"{error}; check that the artifact store is mounted, writable and not full"
        )

    def _collect(self) -> None:
        waiting: list[_Deferred] = []
        for item in self._deferred:
            if not item.future.done():
                waiting.append(item)
                continue
            try:
                event = item.future.result()
            except (OSError, AdapterFolderError, CheckpointError) as error:
                self._events.append(item.failed(error))
            else:
                item.then()
                self._events.append(event)
        self._deferred = waiting

    def _forget(self, job_id: str) -> None:
        job = self.jobs.pop(job_id, None)
        while job is not None and job.drop_youngest():
            pass

    def _fail(self, job: str, code: str, message: str) -> None:
        self._forget(job)
        self._events.append(JobFailed(job, code, message))

    # ---- an iteration ----

    def step(self, interrupted: Callable[[], bool] = lambda: False) -> list[Event]:
        """One iteration: admit, decide, run, commit.

        `interrupted` ends the backward units early (a new request came).
        """
        started = self._clock()
        self._collect()
        self._admit()
        self._advance_jobs()
        view = self._view(started)
        plan = decide(view, self.cost, self._plan_id)
        self._plan_id += 1
        if plan.segments or plan.units:
            self._run(plan, view, started, interrupted)
            self._advance_jobs()
        self._report()
        events, self._events = self._events, []
        return events

    def _admit(self) -> None:
        lacking = self.requests.admit()
        while lacking > 0 and lacking <= self.executor.ledger.held_by("pass:"):
            if not any(job.drop_youngest() for job in reversed(self.jobs.values())):
                return
            lacking = self.requests.admit()

    def _advance_jobs(self) -> None:
        for job in self.jobs.values():
            self._events += job.advance(self._defer_job, may_open=not self.requests.waiting)

    def _view(self, now: float) -> View:
        ttft, tpot = self.config.ttft_s, self.config.tpot_s
        return View(
            now=now,
            sequences=tuple(request.view(ttft, tpot) for request in self.requests.running.values()),
            passes=tuple(self._pass_view(state) for state in self.executor.passes.values()),
            waiting=len(self.requests.waiting),
            ttft_s=ttft,
            tpot_s=tpot,
            max_batch_tokens=self.config.max_batch_tokens,
            tile=self.executor.numerics.tile,
        )

    def _pass_view(self, state: PassState) -> PassView:
        tile = self.executor.numerics.tile
        return PassView(
            id=state.work.id,
            tiles=tuple((span.stop - span.start, (span.index + 1) * tile) for span in state.spans),
            starts=tuple(span.start for span in state.spans),
            layers=state.layers,
            fwd_tile=state.fwd_tile,
            layer=state.layer,
            end_tile=state.end_tile,
            training=state.training,
        )

    def _run(self, plan: Plan, view: View, started: float, interrupted: Callable[[], bool]) -> None:
        forward_started = self._clock()
        if plan.segments:
            slots, logits = self.executor.forward(plan.segments, self.requests.rows())
            self._commit_tokens(plan, slots, logits)
        forward_end = self._clock()
        units = []
        passes = {p.id: p for p in view.passes}
        backward_tokens = 0.0
        unit_started = forward_end
        for unit in plan.units:
            work = unit_work(passes[unit.pass_id], unit.layer, unit.first, unit.end)
            if unit_started + self.cost.unit_bound_s(work) > plan.until or interrupted():
                break
            self.executor.backward(unit)
            unit_end = self._clock()
            units.append((work, unit_end - unit_started))
            unit_started = unit_end
            if not work.head:
                backward_tokens += work.rows / self.executor.model.layers
        forward = forward_work(plan.segments, view)
        forward_s = forward_end - forward_started
        self.cost.observe(forward, forward_s, units)
        total = self.cost.forward_s(forward)
        serving = self.cost.forward_s(
            forward_work(tuple(s for s in plan.segments if s.kind is not Kind.FINETUNE), view)
        )
        finetune_s = sum(s for _, s in units) + (forward_s * (1 - min(1.0, serving / total)) if total > 0 else 0.0)
        end = self._clock()
        self._finetune.add(finetune_s, end - (self._last_step_end or started))
        self._last_step_end = end
        self._events.append(
            IterationDone(
                started_s=started,
                duration_s=end - started,
                until_s=plan.until,
                decode_tokens=forward.decode,
                prefill_tokens=forward.prefill,
                finetune_tokens=forward.finetune,
                backward_tokens=backward_tokens,
                predicted_s=plan.forward_s,
            )
        )

    def _commit_tokens(self, plan: Plan, slots: tuple[int, ...], logits: torch.Tensor) -> None:
        for segment in plan.segments:
            if segment.kind is not Kind.FINETUNE:
                self.requests.advance(segment.slot, segment.length)
        tokens = []
        finite = torch.isfinite(logits).all(-1).tolist()
        for slot, row, usable in zip(slots, logits, finite, strict=True):
            request = self.requests.running[slot]
            if not usable:
                self.requests.release(request)
                message = f"the logits are not finite; adapter version {request.command.adapter} may have diverged"
                self._events.append(RequestFailed(request.command.request_id, "internal_error", message))
                continue
            token = sample(row, request.command.params, len(request.tokens))
            tokens.append(self.requests.emit(slot, token, self._clock()))
        if tokens:
            self._events.append(TokenBatch(tuple(tokens)))

    def _report(self) -> None:
        now = self._clock()
        if now - self._last_report < LOAD_REPORT_S:
            return
        self._last_report = now
        if self.idle:
            self._finetune.add(0.0, now - (self._last_step_end or now))
            self._last_step_end = now
        running = self.requests.running.values()
        first = [r for r in (*running, *self.requests.waiting) if r.last_emit_s is None]
        ledger = self.executor.ledger
        held = ledger.held_by("request:")
        demand = Demand(
            contexts=tuple(r.done for r in running if r.last_emit_s is not None),
            prompts=tuple(len(r.tokens) - r.done for r in first),
            waits_s=tuple(
                max(0.0, now - r.command.arrival_s - (self._finetune.total_s - r.finetune_s_at_arrival)) for r in first
            ),
            finetune_share=self._finetune.share,
            held_pages=held,
            total_pages=ledger.total,
        )
        tile = self.executor.numerics.tile
        percent = saturation_percent(demand, self.cost, self.config.ttft_s, self.config.tpot_s, tile)
        self._events.append(
            LoadReport(now, percent, len(self.requests.waiting), len(self.requests.running), held, ledger.total)
        )
