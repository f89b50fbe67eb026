"""The operator's process: wait for the Lease, list everything, then watch, poll and reconcile until told to stop."""

import asyncio
import logging
import random
import time
from collections.abc import Coroutine
from typing import Any

from aiohttp import web
from pydantic_settings import CliApp

from coserve_api.connect import connect as connect_redis
from coserve_operator import kube as kubernetes
from coserve_operator.apply import Applier
from coserve_operator.budget import StatusBudget
from coserve_operator.controller import Controller, ReconcileError
from coserve_operator.events import Recorder
from coserve_operator.handlers import SELECTORS, watch
from coserve_operator.kube import ENDPOINT, FINETUNE_JOB, Kind, Kube, KubeError, Manifest
from coserve_operator.leader import Leader, LeadershipLostError
from coserve_operator.poller import Poller
from coserve_operator.process import first_of, stop_on_signals
from coserve_operator.queue import BackOff, KeyedQueue
from coserve_operator.settings import Settings
from coserve_operator.store import OperatorStore, StoreError
from coserve_operator.telemetry import Telemetry
from coserve_operator.world import WATCHED, Name, World

logger = logging.getLogger(__name__)


class Operator:
    """The parts of a leading operator, and the loops that drive them."""

    def __init__(self, settings: Settings, kube: Kube, store: OperatorStore, telemetry: Telemetry) -> None:
        self._settings, self._kube, self._store, self._telemetry = settings, kube, store, telemetry
        self._rng = random.Random()
        self.world = World()
        self.queue: KeyedQueue[Name] = KeyedQueue(time.monotonic, BackOff(self._rng))
        self._applier = Applier(kube, time.monotonic)
        self._budget = StatusBudget(time.monotonic)
        recorder = Recorder(kube, settings.identity)
        self.controller = Controller(settings, kube, store, self.world, self._applier, self._budget, recorder)
        self.poller = Poller(self.world, store, self.queue)
        self._sweep = asyncio.Event()

    async def list_all(self) -> None:
        """Read all that matters, so that nothing known to the API server is taken for deleted."""
        for kind in WATCHED:
            listed, version = await self._kube.list_all(kind, SELECTORS[kind])
            self._touch(self.world.replace_all(kind, listed, version))
        self._sweep.set()

    def on_event(self, kind: Kind, type_: str | None, body: Manifest) -> None:
        """Take an event of a watch."""
        metadata = body["metadata"]
        name = (metadata["namespace"], metadata["name"])
        if kind in WATCHED:
            self._touch(self.world.remove(kind, name) if type_ == "DELETED" else self.world.put(kind, body))
        if type_ != "DELETED":
            return
        if kind in (ENDPOINT, FINETUNE_JOB):
            self._budget.forget(metadata["uid"])
            self._applier.forget_owner(metadata["uid"])
            self._sweep.set()
        else:  # an owned object went: apply it again
            self._applier.forget(kind.name, *name)
            for owner in metadata.get("ownerReferences") or []:
                if owner["kind"] == ENDPOINT.name:
                    self._touch({(name[0], owner["name"])})

    async def work(self) -> None:
        """Reconcile group after group."""
        while True:
            group = await self.queue.get()
            self._telemetry.queue.set(len(self.queue))
            try:
                with self._telemetry.seconds.time():
                    again_in_s = await self.controller.reconcile(group)
            except ReconcileError as error:
                delay_s = self.queue.failed(group)
                logger.warning("%s: %s; tried again in %.1f s", "/".join(group), error, delay_s)
                self._telemetry.reconciles.labels("retried").inc()
            except Exception:
                self.queue.failed(group)
                logger.exception("%s: a fault of the operator", "/".join(group))
                self._telemetry.reconciles.labels("failed").inc()
            else:
                self.queue.done(group, again_in_s)
                self._telemetry.reconciles.labels("done").inc()

    async def resync(self) -> None:
        """List and reconcile everything now and then, whatever the watches say."""
        while True:
            await asyncio.sleep(self._settings.resync_seconds * self._rng.uniform(0.8, 1.2))
            try:
                await self.list_all()
            except KubeError as error:
                logger.warning("the resync is put off: %s", error)
                continue
            for group in self.world.groups():
                self.queue.add(group, self._rng.uniform(0.0, min(30.0, self._settings.resync_seconds / 4)))

    async def sweep(self) -> None:
        """Delete from Redis what belongs to endpoints that are gone."""
        while True:
            await self._sweep.wait()
            self._sweep.clear()
            try:
                gone = await self._store.endpoints() - {each.metadata.uid for each in self.world.endpoints()}
                if not gone:
                    continue
                listed, _ = await self._kube.list_all(ENDPOINT)  # the watch may be behind: ask again before deleting
                for uid in gone - {each["metadata"]["uid"] for each in listed}:
                    await self._store.delete_endpoint(uid)
                    logger.info("deleted what Redis held of endpoint %s", uid)
            except (KubeError, StoreError) as error:
                logger.warning("sweeping is put off: %s", error)
                await asyncio.sleep(30)
                self._sweep.set()

    def loops(self) -> list[Coroutine[Any, Any, None]]:
        """Return everything that has to run while this replica leads."""
        workers = [self.work() for _ in range(self._settings.workers)]
        watching = watch(self.on_event, self._settings.identity)
        return [
            watching,
            self.poller.run(self._settings.poll_seconds, self._tick),
            self.resync(),
            self.sweep(),
            *workers,
        ]

    def _tick(self, readable: bool) -> None:
        self._telemetry.beat("poll")
        self._telemetry.redis_up.set(readable)

    def _touch(self, groups: set[Name]) -> None:
        for group in groups:
            self.queue.add(group)


async def run(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT, or until leadership is lost."""
    telemetry = Telemetry(time.monotonic)
    kube = await kubernetes.connect()
    redis = connect_redis(settings.redis_url, settings.redis_username, settings.password)
    key = settings.endpoint_key.get_secret_value() or settings.password or ""
    if not key:
        logger.warning("COSERVE_ENDPOINT_KEY is empty: the endpoints' Redis passwords can be guessed")
    store = OperatorStore(redis, key.encode(), time.monotonic, settings.metrics_password.get_secret_value())
    leader = Leader(kube, settings.namespace, settings.lease, settings.identity, time.monotonic)
    runner = web.AppRunner(telemetry.application(), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, port=settings.health_port).start()
    try:
        with stop_on_signals() as stopped:
            if not await first_of(leader.acquire(), stopped.wait()):
                await _lead(Operator(settings, kube, store, telemetry), leader, telemetry, stopped)
    finally:
        await runner.cleanup()
        await redis.aclose()
        await kube.close()


async def _lead(operator: Operator, leader: Leader, telemetry: Telemetry, stopped: asyncio.Event) -> None:
    telemetry.leading.set(1)
    lost = False
    try:
        hold = asyncio.create_task(leader.hold())
        try:
            if not await first_of(_prime(operator), _wait_for(hold), stopped.wait()):
                await first_of(*operator.loops(), _wait_for(hold), stopped.wait())
        finally:
            hold.cancel()
    except LeadershipLostError:
        lost = True
        raise
    finally:
        telemetry.leading.set(0)
        if not lost:
            await leader.release()


async def _prime(operator: Operator) -> None:
    while True:
        try:
            return await operator.list_all()
        except KubeError as error:
            logger.warning("nothing can be listed yet: %s", error)
            await asyncio.sleep(2)


async def _wait_for(task: "asyncio.Task[None]") -> None:
    await asyncio.shield(task)


def main() -> None:
    """Start the operator."""
    settings = CliApp.run(Settings)
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for chatty in ("kopf.objects", "kopf._core.reactor.running"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    asyncio.run(run(settings))


if __name__ == "__main__":
    main()
