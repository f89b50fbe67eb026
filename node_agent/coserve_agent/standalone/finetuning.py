"""Everything of an agent that trains by itself: its directory, its jobs, and who runs them."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from coserve_agent.adapters.follower import AdapterFollower
from coserve_agent.adapters.registry import AdapterRegistry
from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.concurrency import alongside
from coserve_agent.engine.client import EngineClient
from coserve_agent.errors import EngineGoneError, StartError
from coserve_agent.jobs.surroundings import surroundings
from coserve_agent.jobs.worker import Worker
from coserve_agent.lifecycle import Lifecycle
from coserve_agent.settings import AgentSettings, inherited
from coserve_agent.standalone.adapters import LoadedAdapters
from coserve_agent.standalone.controller import Controller
from coserve_agent.standalone.feeders import Feeders
from coserve_agent.standalone.history import History
from coserve_agent.telemetry.metrics import Metrics
from coserve_api.errors import MessageError
from coserve_contract.away import STORE_AWAY, StoreAwayError
from coserve_contract.keys import agent_id
from coserve_contract.local.database import DATABASE, Database
from coserve_contract.local.fencing import LocalFencing
from coserve_contract.local.store import LocalStore

log = logging.getLogger(__name__)


class LocalFinetuning:
    """As `redis.finetuning.Finetuning`, of a directory whose lock this process has.

    Raises:
        StartError: its database cannot be used.
    """

    def __init__(
        self,
        settings: AgentSettings,
        directory: Path,
        boot_id: str,
        *,
        engine: EngineClient,
        registry: AdapterRegistry,
        tokenizer: Tokenizer,
        lifecycle: Lifecycle,
        metrics: Metrics,
    ) -> None:
        try:
            self._database = Database(directory / DATABASE)
        except StoreAwayError as error:
            raise StartError(f"COSERVE_STATE is {directory}: {error}") from None
        self._directory = directory
        store, history = LocalStore(self._database), History()
        agent = agent_id(settings.pod_uid, boot_id)
        fencing = LocalFencing(self._database, agent)
        fencing.register(agent)
        around = surroundings(
            settings,
            engine=engine,
            fencing=fencing,
            store=store,
            metrics=metrics,
            tokenizer=tokenizer,
            observe=history.add,
        )
        self.worker = Worker(around, agent, lifecycle)
        self.controller = Controller(
            settings,
            agent,
            store=store,
            worker=self.worker,
            registry=registry,
            lifecycle=lifecycle,
            feeders=Feeders(inherited(), time.monotonic),
            history=history,
            loaded=lambda: self.adapters.names,
        )
        publishers = self.controller.publishers
        self.adapters = LoadedAdapters(registry, settings.artifact_store, settings.adapter_dir, publishers)
        self._named = settings.adapters
        self._engine = engine
        self._follower = AdapterFollower(store, registry, lifecycle, now_s=time.monotonic)

    async def run(self) -> None:
        """Raises StartError where what the directory holds cannot be read."""
        try:
            await self.controller.start()
        except (*STORE_AWAY, MessageError) as error:
            raise StartError(f"COSERVE_STATE is {self._directory}: {error}") from None
        await alongside(self.controller.run(), self.worker.run(), self._serve_adapters())

    async def _serve_adapters(self) -> None:
        try:
            await self._engine.ready()
        except EngineGoneError:
            return  # the agent says why
        await self.adapters.start(self._named)
        await self._follower.run()

    async def leave(self) -> None:
        """Let go of the directory."""
        await self._database.close()
