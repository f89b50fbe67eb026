"""The synchronous engine: commands in, events out, one iteration a step. It reads no clock but the injected one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import singledispatchmethod
from pathlib import Path

from coserve_engine.config import EngineConfig
from coserve_engine.errors import AdapterFolderError, EngineConfigError
from coserve_engine.formats.adapter_folder import read_adapter
from coserve_engine.formats.deferred import FileError, FileWork
from coserve_engine.job_messages import JobCommand
from coserve_engine.kernels.fallback import OURS, plain_words, unfit
from coserve_engine.latency.cost import CostModel
from coserve_engine.memory import iteration_bytes
from coserve_engine.messages import (
    AdapterFailed,
    AdapterLoaded,
    AdapterVersion,
    AddRequest,
    Cancel,
    Command,
    CopyAdapter,
    EngineReady,
    Event,
    ExportAdapter,
    ForwardBackward,
    KeepBest,
    LoadAdapter,
    LoadReport,
    OptimStep,
    SaveCheckpoint,
    SetPriority,
    SetReserve,
    SetSlowdown,
    Shutdown,
    StartJob,
    StopJob,
    UnloadAdapter,
)
from coserve_engine.model.calibrate import budget_s, calibrate
from coserve_engine.model.executor import Executor
from coserve_engine.model.probe import differing_operations
from coserve_engine.model.rehearsal import rehearse
from coserve_engine.running.ahead import Ahead
from coserve_engine.running.at_once import AtOnce
from coserve_engine.running.parts import Parts
from coserve_engine.scheduler.iteration import Clock
from coserve_engine.scheduler.load import Demand, saturation_percent
from coserve_engine.scheduler.plan import PassView, Policy, View
from coserve_engine.scheduler.schedule import decide
from coserve_engine.serving.serving import Serving
from coserve_engine.tensors.lora import LoraWeights
from coserve_engine.training.job_table import JobTable
from coserve_engine.training.jobs import Job

LOAD_REPORT_S = 0.25


class Engine:
    """One engine. `submit` commands, call `step` while not `idle`, deliver the events it returns. `paused` are the
    seconds of the machine's pauses until now.
    """

    def __init__(
        self,
        config: EngineConfig,
        clock: Callable[[], float] = time.monotonic,
        policy: Policy = decide,
        paused: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.config, self._clock, self._policy = config, clock, policy
        started = clock()
        self.executor = Executor(config)
        self._loading_s = clock() - started
        self._adapters: dict[AdapterVersion, LoraWeights] = {}
        self._wanted: dict[AdapterVersion, int] = {}
        """Versions that are loaded, or will be, and the number of the load."""
        self._loads = 0
        self.serving = Serving(self.executor, self._adapters)
        self.requests = self.serving.requests
        self.cost = CostModel()
        self.closed = False
        self._events: list[Event] = []
        self._files = FileWork()
        self._jobs = JobTable(config, self.executor, self._files, self._events.append)
        self._parts = Parts(self.executor, self.serving, self._jobs, self.cost, self._events)
        self._runner = (
            Ahead(self._parts, clock) if self.executor.copies.behind else AtOnce(self._parts, Clock(clock, paused))
        )
        self._reserve_s = 0.0
        self._slowdown_percent = config.max_slowdown_percent
        self._plan_id = 0
        self._last_report = -1.0

    def ready(self) -> EngineReady:
        """Load what iterations need and calibrate the latency model; the first thing to call."""
        e = self.executor
        e.copies.reserve(iteration_bytes(e.model, self.config))
        if e.copies.behind:  # a CPU loads nothing at first use
            rehearse(e)
        captured = e.capture(self._clock)
        calibrated = calibrate(e, self.cost, self._clock, budget_s(self._loading_s))
        started = self._clock()
        odd = differing_operations(e) if e.kernels.exact else ()
        tried_s = self._clock() - started
        if self.config.exact and odd:
            raise EngineConfigError(
                f"engine.numericsMode is Exact, and on this machine rows of {', '.join(odd)} depend on their batch, or "
                "on how a pass was cut; set engine.numericsMode to Fast, or use another kind of device"
            )
        notes = (f"loaded in {self._loading_s:.1f} s", *calibrated, f"tried rows of products in {tried_s:.1f} s")
        notes += (self.serving.compiler.prepare(),)
        if captured:
            notes += (f"forwards were captured in {captured} sizes",)
        if self.config.exact:
            notes += ("engine.numericsMode is Exact: rows and gradients have the same bits in any batch here",)
        if odd:
            notes += (f"rows of {', '.join(odd)} depend on their batch: results are not bit-exact on this machine",)
        notes += tuple(e.kernels.notes())
        plain = plain_words(e.kernels, e.device, e.dtypes)
        why = unfit(e.model) if plain else None
        if why is not None:
            notes += (f"{len(plain)} of {len(OURS)} words have kernels and are computed without: {why.said}",)
        return EngineReady(
            e.model.vocab_size,
            self.config.max_model_length,
            e.ledger.total,
            e.numerics.page,
            notes,
            pass_tokens=self.config.pass_tokens,
            plain_words=len(plain),
            plain_reason=None if why is None else why.reason,
        )

    @property
    def jobs(self) -> Mapping[str, Job]:
        """The jobs that run."""
        return self._jobs.running

    @property
    def idle(self) -> bool:
        """Nothing to compute and nothing to wait for but commands."""
        waits = self.requests.running or self.requests.waiting or self.serving.compiling.waiting or self._events
        return not (waits or self.busy) and self._files.idle and self._jobs.idle

    @property
    def busy(self) -> bool:
        """Whether a device has something under way: `step` waits for it itself."""
        return self._runner.busy

    # ---- commands ----

    def submit(self, command: Command) -> None:
        """Accept a command; what it cannot do is said by an event, never raised."""
        self._accept(command)

    @singledispatchmethod
    def _accept(self, command: Command) -> None:
        raise TypeError(f"not a command: {command!r}")

    @_accept.register
    def _(self, command: AddRequest) -> None:
        self._events += self.serving.add(command, self._runner.accounts.time.finetune_s)

    @_accept.register
    def _(self, command: Cancel) -> None:
        self.serving.cancel(command.request_id)

    @_accept.register
    def _(self, command: LoadAdapter) -> None:
        version = command.version
        if version in self._wanted:
            message = f"version is {version}, which is loaded or being loaded already; unload it first"
            self._events.append(AdapterFailed(version, message))
            return
        self._loads += 1
        number = self._wanted[version] = self._loads

        def load() -> LoraWeights:
            folder, e = Path(command.path), self.executor
            layers = read_adapter(folder, e.model, self.config.max_rank, e.dtype)
            return LoraWeights.served(layers, number, turned=e.kernels.turned).moved(e.copies.carry)

        def loaded(weights: LoraWeights) -> None:
            if self._wanted.get(version) != number:
                failed(AdapterFolderError(f"{command.path}: unloaded before it was loaded"))
                return
            self._adapters[version] = weights
            self._events.append(AdapterLoaded(version, weights.bytes))

        def failed(error: FileError) -> None:
            if self._wanted.get(version) == number:
                del self._wanted[version]
            self._events.append(AdapterFailed(version, str(error)))

        self._files.defer(load, loaded, failed)

    @_accept.register
    def _(self, command: CopyAdapter) -> None:
        version, job = command.version, self.jobs.get(command.job)
        if version in self._wanted or job is None:
            taken = f"version is {version}, which is loaded or being loaded already; unload it first"
            message = f"job {command.job} does not run here" if job is None else taken
            self._events.append(AdapterFailed(version, message))
            return
        self._loads += 1
        self._wanted[version] = self._loads
        weights = self._adapters[version] = job.served(self._loads)
        self._events.append(AdapterLoaded(version, weights.bytes, job.step))

    @_accept.register
    def _(self, command: UnloadAdapter) -> None:
        self._wanted.pop(command.version, None)
        self._adapters.pop(command.version, None)  # running requests keep their reference

    @_accept.register(StartJob)
    @_accept.register(SetPriority)
    @_accept.register(ForwardBackward)
    @_accept.register(OptimStep)
    @_accept.register(KeepBest)
    @_accept.register(SaveCheckpoint)
    @_accept.register(ExportAdapter)
    @_accept.register(StopJob)
    def _(self, command: JobCommand) -> None:
        self._jobs.submit(command)

    @_accept.register
    def _(self, command: SetReserve) -> None:
        self._reserve_s = command.seconds

    @_accept.register
    def _(self, command: SetSlowdown) -> None:
        told = command.percent
        self._slowdown_percent = self.config.max_slowdown_percent if told is None else told

    @_accept.register
    def _(self, command: Shutdown) -> None:
        self.closed = True

    # ---- an iteration ----

    def step(
        self, interrupted: Callable[[], bool] = lambda: False, emit: Callable[[list[Event]], None] | None = None
    ) -> list[Event]:
        """One iteration: admit, decide, run, commit. Returns its events.

        Args:
            interrupted: ends the backward units early (a new request came), and a forward that serves nobody where
                the request would wait too long for its end.
            emit: takes the events that are there before the units run, tokens among them; without it they are returned
                with the others.
        """
        started = self._clock()
        begins_s = self._runner.begin(started)
        self._files.collect()
        self._events += self.serving.collect()
        self.serving.make_room(self._jobs.drop_youngest, started)
        self._jobs.advance(may_open=not self.requests.waiting)
        view = self._view(begins_s)
        plan = self._policy(view, self.cost, self._plan_id)
        self._plan_id += 1
        if plan.segments or plan.units:
            self._runner.run(plan, view, interrupted, emit)
            self._jobs.advance(may_open=not self.requests.waiting)
        else:
            self._runner.rest(emit)
        if self.idle:
            self._runner.accounts.rest()
        self._report()
        return self._parts.taken()

    def _view(self, now: float) -> View:
        ttft, tpot, slowdown = self.config.ttft_s, self.config.tpot_s, self._slowdown_percent
        return View(
            now=now,
            sequences=self.requests.views(ttft, tpot),
            passes=tuple(PassView(p.shape, p.fwd_tile, p.layer, p.end_tile) for p in self._jobs.passes()),
            waiting=len(self.requests.waiting),
            ttft_s=ttft,
            tpot_s=tpot,
            max_batch_tokens=self.config.max_batch_tokens,
            tile=self.executor.numerics.tile,
            max_slowdown=None if slowdown is None else slowdown / 100,
            reaches=self.executor.reaches,
            reserve_s=self._reserve_s,
            max_window_rows=self.config.max_window_rows,
        )

    def _report(self) -> None:
        now = self._clock()
        if now - self._last_report < LOAD_REPORT_S:
            return
        self._last_report = now
        requests = (r.load() for r in (*self.requests.running.values(), *self.requests.waiting))
        ledger = self.executor.ledger
        held = ledger.held_by("request:")
        demand = Demand.of(requests, now, self._runner.accounts.time, held, ledger.total)
        tile, reaches = self.executor.numerics.tile, self.executor.reaches
        percent = saturation_percent(demand, self.cost, self.config.ttft_s, self.config.tpot_s, tile, reaches)
        self._events.append(
            LoadReport(
                at_s=now,
                saturation_percent=percent,
                waiting=len(self.requests.waiting) + len(self.serving.compiling.waiting),
                running=len(self.requests.running),
                kv_used_pages=held,
                kv_total_pages=ledger.total,
                prefix_queries=self.requests.prefix_queries,
                prefix_hits=self.requests.prefix_hits,
                preemptions=self.requests.preemptions,
            )
        )
