"""What an agent does through Redis: its heartbeat, the published adapters, and the jobs that are bound to it."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress

from coserve_agent.adapters.follower import AdapterFollower
from coserve_agent.adapters.registry import AdapterRegistry
from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.concurrency import alongside
from coserve_agent.engine.client import EngineClient
from coserve_agent.jobs.surroundings import surroundings
from coserve_agent.jobs.worker import Worker
from coserve_agent.lifecycle import Lifecycle
from coserve_agent.redis.heartbeat import HeartbeatLoop
from coserve_agent.settings import AgentSettings
from coserve_agent.telemetry.metrics import Metrics
from coserve_agent.telemetry.slo import SloMeter
from coserve_api.endpoint import FinetuningPolicy
from coserve_contract.away import STORE_AWAY
from coserve_contract.connect import connect
from coserve_contract.keys import Keys, agent_id
from coserve_contract.messages import Heartbeat, Load, SloReport
from coserve_contract.scripts import Fencing
from coserve_contract.store import Store

log = logging.getLogger(__name__)

LEAVE_S = 2.0


class Finetuning:
    """Everything of an agent that needs Redis."""

    def __init__(
        self,
        settings: AgentSettings,
        redis_url: str,
        boot_id: str,
        *,
        engine: EngineClient,
        registry: AdapterRegistry,
        tokenizer: Tokenizer,
        lifecycle: Lifecycle,
        metrics: Metrics,
        meter: SloMeter,
    ) -> None:
        password = settings.redis_password
        self._redis = connect(
            redis_url, settings.redis_username, password.get_secret_value() if password else None, settings.redis_ca
        )
        keys = Keys(settings.endpoint_uid)
        self.agent = agent_id(settings.pod_uid, boot_id)
        self._settings = settings
        self._boot_id = boot_id
        self._engine = engine
        self._registry = registry
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._meter = meter
        self._fencing = Fencing(self._redis, keys, self.agent)
        store = Store(self._redis, keys)
        around = surroundings(
            settings, engine=engine, fencing=self._fencing, store=store, metrics=metrics, tokenizer=tokenizer
        )
        self.worker = Worker(around, self.agent, lifecycle)
        self._heartbeat = HeartbeatLoop(self._fencing, self.beat, now_s=time.monotonic)
        self._follower = AdapterFollower(store, registry, lifecycle, now_s=time.monotonic)

    async def run(self) -> None:
        await alongside(self.worker.run(), self._heartbeat.run(), self._follower.run())

    async def leave(self) -> None:
        """Take the agent out of the index: it is not lost, it has ended."""
        with suppress(*STORE_AWAY):
            async with asyncio.timeout(LEAVE_S):
                await self._fencing.leave()
        await self._redis.aclose()

    def beat(self) -> Heartbeat:
        settings, load, slo = self._settings, self._metrics.last_load, self._meter.report()
        return Heartbeat(
            agent_id=self.agent,
            pod_name=settings.pod_name,
            pod_uid=settings.pod_uid,
            boot_id=self._boot_id,
            node=settings.node_name,
            ready=self._lifecycle.not_ready() is None,
            draining=self._lifecycle.draining,
            model_loaded=self._lifecycle.model_loaded,
            device=self._engine.device[:253],
            max_jobs=settings.max_concurrent_jobs if settings.finetuning is FinetuningPolicy.ALLOWED else 0,
            load=Load(
                saturation_percent=self._metrics.load_average.percent() or 0.0,
                waiting=load.waiting if load else 0,
                running=load.running if load else 0,
                kv_percent=100.0 * load.kv_used_pages / load.kv_total_pages if load and load.kv_total_pages else 0.0,
            ),
            slo=SloReport(
                ttft_p99_ms=slo.ttft_p99_ms,
                tpot_p99_ms=slo.tpot_p99_ms,
                attainment_percent=slo.attainment_percent,
                requests=slo.requests,
            ),
            adapters=self._registry.numbers(),
            failed_adapters=self._registry.failures(),
            jobs=self.worker.beats(),
        )
