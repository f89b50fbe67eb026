"""The agent's parts put together, from settings to exit status."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from importlib.metadata import version
from pathlib import Path

from coserve_agent.adapters.live import LiveAdapters, Training
from coserve_agent.adapters.names import Names
from coserve_agent.adapters.registry import AdapterRegistry
from coserve_agent.adapters.served import Served
from coserve_agent.adapters.shelf import Shelf
from coserve_agent.api import application
from coserve_agent.chat.end_tokens import end_tokens
from coserve_agent.chat.format import USER
from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.chat.variables import TemplateVariableError, check_variables, try_variables
from coserve_agent.concurrency import alongside, end
from coserve_agent.engine.client import EngineClient
from coserve_agent.errors import EngineGoneError, StartError
from coserve_agent.generation.chat import Serving
from coserve_agent.generation.generator import Generator
from coserve_agent.http import admin
from coserve_agent.http.middleware import CloseWhileDraining, wrap
from coserve_agent.http.servers import Server, listen
from coserve_agent.lifecycle import Lifecycle
from coserve_agent.model.generation_config import SamplingDefaults, sampling_defaults
from coserve_agent.redis.finetuning import Finetuning
from coserve_agent.settings import PREFIX, AgentSettings
from coserve_agent.standalone import adapter_routes
from coserve_agent.standalone import routes as job_routes
from coserve_agent.standalone.finetuning import LocalFinetuning
from coserve_agent.standalone.lock import DirectoryLock
from coserve_agent.telemetry.metrics import Metrics
from coserve_agent.telemetry.pacing import Pacer
from coserve_agent.telemetry.slo import Slo, SloMeter
from coserve_agent.tools.answer_format import answer_format
from coserve_api.endpoint import FinetuningPolicy, GenerationConfig, KernelFallback, NumericsMode
from coserve_engine.config import EXACT, FAST, DeviceChoice, EngineConfig
from coserve_engine.host import EngineHost, settle
from coserve_engine.latency.reserve import Reserve
from coserve_engine.messages import IterationDone

log = logging.getLogger(__name__)

# After the engine ended: time for the last 500s to reach their clients.
FLUSH_S = 0.5

IN_A_CLUSTER = "in a cluster a job is a custom resource: kubectl apply a FinetuneJob that names this endpoint"
LOADED_IN_A_CLUSTER = (
    "in a cluster adapters are published: by a FinetuneJob that names this endpoint, and spec.adapters of the "
    "InferenceEndpoint says which version is served"
)
SERVES_ONLY = "this server serves only: start it with COSERVE_STATE, the directory for its jobs, to train as well"

WAY_SHARE = 0.1
"""Of the time per output token, what is kept free at least: the way from here to the client is not seen here."""


class Agent:
    """One agent process. Build it in a running loop, then `run` it once.

    Raises:
        StartError: a setting, a port or the tokenizer is wrong.
    """

    def __init__(self, settings: AgentSettings) -> None:
        self.settings = settings
        self._lock = None if settings.state is None else DirectoryLock(settings.state)
        self.boot_id = uuid.uuid4().hex
        self.lifecycle = Lifecycle()
        self.tokenizer = Tokenizer(settings.model_path)
        ends = end_tokens(settings.model_path, self.tokenizer)
        try:
            check_variables(self.tokenizer, settings.template_variables, "engine.templateVariables")
            try_variables(self.tokenizer, settings.template_variables, "engine.templateVariables", [USER])
        except TemplateVariableError as error:
            raise StartError(str(error)) from None
        defaults = request_defaults(settings)
        http_socket = listen(settings.host, settings.http_port, PREFIX + "HTTP_PORT")
        admin_socket = listen(settings.host, settings.admin_port, PREFIX + "ADMIN_PORT")
        self.metrics = Metrics(settings.model_name, time.monotonic)
        slo = Slo(settings.ttft_ms / 1000, settings.tpot_ms / 1000)
        level = logging.getLogger().getEffectiveLevel()
        self.engine_host = EngineHost.start(engine_config(settings, ends), device_choice(settings), level)
        self.engine = EngineClient(self.engine_host, self._on_iteration, self.metrics.on_load)
        reserve = Reserve(slo.tpot_s, settings.slo_percentile, least_share=WAY_SHARE)
        self.pacer = Pacer(reserve, self.metrics, self.engine.submit)
        self.meter = SloMeter(slo, time.monotonic, self.pacer)
        base = Served(
            settings.model_name,
            None,
            str(settings.model_path),
            int(time.time()),
            variables=settings.template_variables,
        )
        self.registry = AdapterRegistry(Shelf(self.engine, settings.adapter_bytes), base, settings.artifact_store)
        live = LiveAdapters(self.engine, self._training, base)
        self.generator = Generator(
            self.engine,
            self.tokenizer,
            Names(self.registry, live),
            self.lifecycle,
            self.meter,
            self.metrics,
            max_model_length=settings.max_model_length,
            max_waiting=settings.max_waiting,
            ttft_s=slo.ttft_s,
            now_s=time.monotonic,
            defaults=defaults,
        )
        answers = answer_format(self.tokenizer, settings.tool_call_parser)
        log.info("agent: %s", answers)
        app = application.build(Serving(self.generator, answers, settings.max_body_bytes), version("coserve"))
        self.finetuning: Finetuning | LocalFinetuning | None = None
        if settings.state is not None:
            self.finetuning = local = self._local_finetuning(settings.state)
            job_routes.add(app, local.controller, settings.max_body_bytes)
            adapter_routes.add(app, local.adapters, settings.max_body_bytes)
        elif settings.redis_url is not None:
            self.finetuning = self._finetuning(settings.redis_url)
            job_routes.refuse(app, IN_A_CLUSTER)
            adapter_routes.refuse(app, LOADED_IN_A_CLUSTER)
        else:
            job_routes.refuse(app, SERVES_ONLY)
            adapter_routes.refuse(app, SERVES_ONLY)
        api = wrap(app, settings.cors_origins)
        inside = admin.build(self.lifecycle, self.metrics, self.meter, self.engine)
        self.http = Server(CloseWhileDraining(api, lambda: self.lifecycle.draining), http_socket)
        self.admin = Server(CloseWhileDraining(inside, lambda: self.lifecycle.draining), admin_socket)

    def _local_finetuning(self, directory: Path) -> LocalFinetuning:
        return LocalFinetuning(
            self.settings,
            directory,
            self.boot_id,
            engine=self.engine,
            registry=self.registry,
            tokenizer=self.tokenizer,
            lifecycle=self.lifecycle,
            metrics=self.metrics,
        )

    def _finetuning(self, redis_url: str) -> Finetuning:
        return Finetuning(
            self.settings,
            redis_url,
            self.boot_id,
            engine=self.engine,
            registry=self.registry,
            tokenizer=self.tokenizer,
            lifecycle=self.lifecycle,
            metrics=self.metrics,
            meter=self.meter,
        )

    def _training(self) -> list[Training]:
        return [] if self.finetuning is None else self.finetuning.worker.training()

    def _on_iteration(self, event: IterationDone) -> None:
        self.metrics.on_iteration(event)
        self.meter.paused_s = event.pauses_s
        if self.engine.alive:
            self.pacer.iteration(event)

    def stop(self) -> None:
        """Begin to drain; `run` returns when it is done. Again is nothing new: a kubelet that was restarted, or given a
        shorter grace period, sends SIGTERM a second time.
        """
        if not self.lifecycle.draining:
            log.info("agent: draining")
            self.lifecycle.start_draining()

    async def run(self) -> int:
        """Serve until `stop`; returns the exit status: 0, or 1 if the engine ended.

        Raises:
            StartError: the model cannot be loaded.
        """
        self.engine.start()
        servers = [asyncio.create_task(server.run_until_stopped()) for server in (self.http, self.admin)]
        log.info("agent: boot %s, http port %d, admin port %d", self.boot_id, self.http.port, self.admin.port)
        background = [self.engine.watch(), _still_running(servers)]
        if self.finetuning is not None:
            background.append(self.finetuning.run())
        try:
            status = await alongside(self._serve(), *background)
            if self.finetuning is not None:
                await self.finetuning.leave()
            return status
        finally:
            self.http.stop()
            self.admin.stop()
            await asyncio.gather(*servers, return_exceptions=True)
            await self.engine.close()
            if self._lock is not None:
                self._lock.release()

    async def _serve(self) -> int:
        loading = asyncio.create_task(self._load())
        told = asyncio.create_task(self.lifecycle.until_draining())
        gone = asyncio.create_task(self.engine.gone())
        tasks = [loading, told, gone]
        try:
            await asyncio.wait((loading, told), return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                loading.result()
            await asyncio.wait((gone, told), return_when=asyncio.FIRST_COMPLETED)
            if not gone.done():
                drain = asyncio.create_task(self._drain())
                tasks.append(drain)
                await asyncio.wait((gone, drain), return_when=asyncio.FIRST_COMPLETED)
                if drain.done():
                    drain.result()
                    return 0
            log.error("agent: ends, because the engine ended: %s", gone.result())
            await asyncio.sleep(FLUSH_S)
            return 1
        finally:
            await end(*tasks)

    async def _load(self) -> None:
        begun_s = time.monotonic()
        try:
            ready = await self.engine.ready()
        except EngineGoneError as error:
            raise StartError(str(error)) from None
        if self.tokenizer.size > ready.vocab_size:
            log.warning(
                "agent: tokenizer.json has %d tokens and the model %d; prompts with the others are refused",
                self.tokenizer.size,
                ready.vocab_size,
            )
        for note in ready.notes:
            log.info("engine: %s", note)
        self.metrics.on_ready(ready)
        if ready.plain_reason is not None:
            self.lifecycle.slow = f"plain operators compute ({ready.plain_reason}), slower than the GPU's kernels"
            log.warning("engine: %s", self.lifecycle.slow)
        log.info("engine: model loaded in %.1f s, %d KV pages", time.monotonic() - begun_s, ready.kv_total_pages)
        settle()
        self.pacer.tell()
        self.lifecycle.model_loaded = True
        if self.finetuning is None:
            self.lifecycle.set_adapters(())

    async def _drain(self) -> None:
        """Serve on for a while, give the jobs back meanwhile, finish what runs, and let go of idle connections last; no
        longer than the grace period allows.
        """
        # Nobody was sent to an agent that has no model yet.
        stay_s = self.settings.drain_s if self.lifecycle.model_loaded else 0.0
        work = [self._serve_on(stay_s)]
        if self.finetuning is not None:
            work.append(self.finetuning.worker.drain())
        try:
            async with asyncio.timeout(self.settings.shutdown_s):
                await asyncio.gather(*work)
                await self.http.close_idle(stay_s)
            log.info("agent: drained")
        except TimeoutError:
            jobs = 0 if self.finetuning is None else len(self.finetuning.worker.beats())
            log.warning("agent: ends with %d requests and %d jobs unfinished", self.engine.in_flight(), jobs)
            self.engine.refuse_rest("draining", "the agent shut down before the answer was complete; send it again")

    async def _serve_on(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self.http.stop_listening()
        log.info("agent: accepts no more connections, %d requests run", self.engine.in_flight())


async def _still_running(servers: list[asyncio.Task[None]]) -> None:
    """Raises when one of them ends by itself."""
    done, _ = await asyncio.wait(servers, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()
    raise RuntimeError("an HTTP server ended by itself")


def request_defaults(settings: AgentSettings) -> SamplingDefaults:
    """How to sample where a request does not say; the log says it, too.

    Raises:
        StartError: the model's generation_config.json has a wrong value.
    """
    source = settings.generation_config
    neutral = source is GenerationConfig.NEUTRAL
    defaults = SamplingDefaults() if neutral else sampling_defaults(settings.model_path)
    log.info("agent: sampling where a request does not say: %s (%sGENERATION_CONFIG %s)", defaults, PREFIX, source)
    return defaults


def device_choice(settings: AgentSettings) -> DeviceChoice:
    """What the engine's process settles, since only it can see the device."""
    return DeviceChoice(
        device=settings.device.value,
        gpu_resource=settings.gpu_resource,
        dtype=settings.dtype.value,
        max_requests=settings.max_requests,
        max_batch_tokens=settings.max_batch_tokens,
        kv_cache_bytes=settings.kv_cache_bytes,
        max_jobs=settings.max_concurrent_jobs,
        kernel_cache=None if settings.kernel_cache is None else str(settings.kernel_cache),
        image_kernels=None if settings.image_kernels is None else str(settings.image_kernels),
        visible_devices=settings.visible_devices,
    )


def engine_config(settings: AgentSettings, end_tokens: tuple[int, ...]) -> EngineConfig:
    """All of the engine's settings but for `device_choice`."""
    return EngineConfig(
        model_path=str(settings.model_path),
        max_model_length=settings.max_model_length,
        max_waiting=settings.max_waiting,
        ttft_s=settings.ttft_ms / 1000,
        tpot_s=settings.tpot_ms / 1000,
        threads=settings.threads,
        finetuning=settings.finetuning is FinetuningPolicy.ALLOWED,
        max_rank=settings.max_rank,
        max_slowdown_percent=settings.max_slowdown_percent,
        pass_bytes=settings.pass_bytes,
        end_tokens=end_tokens,
        numerics_mode=EXACT if settings.numerics_mode is NumericsMode.EXACT else FAST,
        kernel_fallback=settings.kernel_fallback is KernelFallback.ALLOWED,
    )
