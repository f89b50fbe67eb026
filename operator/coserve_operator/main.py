"""The operator's process: wait for the Lease, list everything, watch, poll and reconcile until told to stop."""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from functools import partial

from pydantic_settings import CliApp

from coserve_operator import kube as kubernetes
from coserve_operator.apply.budget import StatusBudget
from coserve_operator.apply.events import Recorder
from coserve_operator.apply.metrics_slot import MetricsSlotKeeper
from coserve_operator.apply.objects import Applier
from coserve_operator.apply.own_secrets import ServingCertificate, with_access
from coserve_operator.apply.tenant_redis import TenantRedisKeeper
from coserve_operator.controller import Controller, ReconcileError
from coserve_operator.kube import ENDPOINT, FINETUNE_JOB, Kind, Kube, KubeError, Manifest
from coserve_operator.leader import Leader, LeadershipLostError
from coserve_operator.process import first_of, serving
from coserve_operator.queue import BackOff, KeyedQueue, Lane
from coserve_operator.redis.polling import Polling
from coserve_operator.redis.store import OperatorStore, StoreError
from coserve_operator.redis.stores import Stores
from coserve_operator.settings import Settings
from coserve_operator.telemetry import Telemetry
from coserve_operator.tls import RedisTls, read_tls, until_renewed
from coserve_operator.watch.cache import WATCHED, Cache, Name
from coserve_operator.watch.handlers import SELECTORS, operate, registry

logger = logging.getLogger(__name__)
AGAIN_S = 1.0


class Operator:
    """The parts of a leading operator, and the loops that drive them."""

    def __init__(self, settings: Settings, kube: Kube, stores: Stores, telemetry: Telemetry, tls: RedisTls) -> None:
        self._settings, self._kube, self._stores, self._telemetry, self._tls = settings, kube, stores, telemetry, tls
        self._rng = random.Random()
        self.cache = Cache()
        self.queue: KeyedQueue[Name] = KeyedQueue(time.monotonic, BackOff(self._rng))
        self._applier = Applier(kube, time.monotonic)
        self._budget = StatusBudget(time.monotonic)
        recorder = Recorder(kube, settings.identity)
        service, secret = settings.metrics_api_service, settings.metrics_api_certificate
        ours = (settings.namespace, service) if service else None
        self._metrics_slot = MetricsSlotKeeper(kube, ours, time.monotonic, partial(self._reconcile_all, 5.0))
        self._certificate = ServingCertificate(kube, settings.namespace, secret, f"{service}.{settings.namespace}.svc")
        self.controller = Controller(
            settings, kube, stores, self.cache, self._applier, self._budget, recorder, self._metrics_slot
        )
        self.polling = Polling(self.cache, stores, self.queue, settings.full_poll_seconds, self._budget)
        how = settings.tenant_redis
        self._tenant_redis = None
        if how is not None:
            self._tenant_redis = TenantRedisKeeper(kube, settings, how, tls, self.cache, stores, time.monotonic)
        self._sweep = asyncio.Event()
        self.listed = asyncio.Event()
        """Set once everything was listed for the first time."""

    async def list_all(self) -> None:
        """Read all that matters, so that nothing known to the API server is taken for deleted."""
        for kind in WATCHED:
            names, version = set[Name](), 0
            async for page, as_of in self._kube.pages(kind, SELECTORS[kind]):
                version = as_of
                for body in page:
                    names.add((body["metadata"]["namespace"], body["metadata"]["name"]))
                    self._touch(self.cache.put(kind, body))
            self._touch(self.cache.retain(kind, names, version))
        self._sweep.set()

    def on_event(self, kind: Kind, type_: str | None, body: Manifest) -> None:
        """Take an event of a watch."""
        metadata = body["metadata"]
        name = (metadata["namespace"], metadata["name"])
        if kind in WATCHED:
            gone = type_ == "DELETED"
            touched = self.cache.remove(kind, name, metadata["uid"]) if gone else self.cache.put(kind, body)
            waits = kind in (ENDPOINT, FINETUNE_JOB) and (gone or _is_asked_for(body))
            self._touch(touched, None if type_ is None else Lane.ASKED if waits else Lane.HAPPENED)
        if self._tenant_redis is not None:
            self._tenant_redis.on_event(kind, type_, body)
        if type_ != "DELETED":
            owner = self._applier.observe(kind.name, body)
            if owner is not None:
                self._touch({(metadata["namespace"], owner)})
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
                    requeue_after_s = await self.controller.reconcile(group)
            except ReconcileError as error:
                delay_s = self.queue.failed(group)
                logger.warning("%s: %s; tried again in %.1f s", "/".join(group), error, delay_s)
                self._telemetry.reconciles.labels("retried").inc()
            except Exception:
                self.queue.failed(group)
                logger.exception("%s: a fault of the operator", "/".join(group))
                self._telemetry.reconciles.labels("failed").inc()
            else:
                self.queue.done(group, requeue_after_s)
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
            self._reconcile_all(min(30.0, self._settings.resync_seconds / 4))

    def _reconcile_all(self, within_s: float) -> None:
        for group in self.cache.groups():
            self.queue.add(group, self._rng.uniform(0.0, within_s))

    async def sweep(self) -> None:
        """Delete from Redis what belongs to endpoints that are gone."""
        while True:
            await self._sweep.wait()
            self._sweep.clear()
            done = await asyncio.gather(*map(self._sweep_tenant, self._stores.all()))
            if not all(done):
                await asyncio.sleep(30)
                self._sweep.set()

    async def _sweep_tenant(self, store: OperatorStore) -> bool:
        """Return whether it could be done."""
        try:
            gone = await store.endpoints() - {each.metadata.uid for each in self.cache.endpoints()}
            if not gone:
                return True
            listed, _ = await self._kube.list_all(ENDPOINT)  # the watch may be behind: ask again before deleting
            for uid in gone - {each["metadata"]["uid"] for each in listed}:
                await store.delete_endpoint(uid)
                logger.info("deleted what Redis held of endpoint %s", uid)
        except (KubeError, StoreError) as error:
            logger.warning("sweeping is put off: %s", error)
            return False
        return True

    async def run(self) -> None:
        """Do everything that has to be done while this replica leads, until something of it ends."""
        while True:
            try:
                await self._metrics_slot.look()  # first: an autoscaler that can stay must not go
                missing = await self._kube.missing(ENDPOINT, FINETUNE_JOB)
                if not missing:
                    await self.list_all()
                    break
                logger.warning("no CRD %s: apply it", " and ".join(missing))
            except KubeError as error:
                logger.warning("nothing can be listed yet: %s", error)
            await asyncio.sleep(2)
        self.listed.set()
        workers = [self._for_ever("work", self.work) for _ in range(self._settings.workers)]
        polling = partial(self.polling.run, self._settings.poll_seconds, self._tick)
        loops: list[tuple[str, Callable[[], Awaitable[None]]]]
        loops = [("poll", polling), ("resync", self.resync), ("sweep", self.sweep)]
        loops.append(("metrics slot", self._metrics_slot.run))
        if self._settings.metrics_api_certificate:
            loops.append(("certificate", self._certificate.run))
        if self._tenant_redis is not None:
            loops.append(("tenants' Redis", self._tenant_redis.run))
        renewed = [until_renewed(self._settings.redis_tls, self._tls)] if self._settings.redis_tls else []
        await first_of(*(self._for_ever(*loop) for loop in loops), *workers, *renewed)

    async def _for_ever(self, name: str, loop: Callable[[], Awaitable[None]]) -> None:
        """Begin a loop again that ends by a fault of ours: those of one tenant would else end it for all."""
        while True:
            try:
                await loop()
            except Exception:
                logger.exception("%s: a fault of the operator; it goes on", name)
                self._telemetry.faults.labels(name).inc()
                await asyncio.sleep(AGAIN_S)

    def _tick(self, readable: bool) -> None:
        self._telemetry.beat("poll")
        self._telemetry.redis_up.set(readable)

    def _touch(self, groups: set[Name], lane: Lane | None = None) -> None:
        for group in groups:
            self.queue.add(group) if lane is None else self.queue.hurry(group, lane)


def _is_asked_for(body: Manifest) -> bool:
    """Return whether somebody has changed an object of ours, and waits for what comes of it."""
    metadata, seen = body["metadata"], (body.get("status") or {}).get("observedGeneration")
    return "deletionTimestamp" in metadata or metadata.get("generation") != seen


class Lifetime:
    """An operator in kopf's loop: it waits for the Lease, works while it has it, and gives it back."""

    def __init__(self, operator: Operator, leader: Leader, telemetry: Telemetry) -> None:
        self._operator, self._leader, self._telemetry = operator, leader, telemetry
        self._leading: asyncio.Task[None] | None = None
        self.stop = asyncio.Event()
        """Set when nothing is left to do."""
        self.error: BaseException | None = None
        """What ended the work."""

    async def start(self) -> None:
        """Wait until this replica is to work, and begin; return when there is something to watch, since kopf looks only
        once which kinds there are.
        """
        await self._leader.acquire()
        self._telemetry.leading.set(1)
        self._leading = asyncio.create_task(self._lead())
        listed = asyncio.create_task(self._operator.listed.wait())
        try:
            await asyncio.wait({listed, self._leading}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await self.end()
            raise
        finally:
            listed.cancel()

    async def _lead(self) -> None:
        try:
            await first_of(self._leader.hold(), self._operator.run())
        finally:
            self.stop.set()

    async def end(self) -> None:
        """End all work, and only then let another replica begin."""
        task = self._leading
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
            self._telemetry.leading.set(0)
            self.error = None if task.cancelled() else task.exception()
            if not isinstance(self.error, LeadershipLostError):
                await self._leader.release()


async def run(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT, or until leadership is lost."""
    telemetry = Telemetry(time.monotonic)
    telemetry.trouble = lambda: "it waits for the API server"
    # the kubelet's questions first of all: who waits for the API server is alive
    async with serving(telemetry.application(), settings.health_port):
        await _operate(settings, telemetry)


async def _operate(settings: Settings, telemetry: Telemetry) -> None:
    kube = await kubernetes.connect()
    settings = await with_access(settings, kube)
    tls = read_tls(settings.redis_tls)
    leader = Leader(kube, settings.namespace, settings.lease, settings.identity)
    telemetry.trouble = lambda: leader.trouble
    stores = Stores(settings, leader, time.monotonic, tls)
    operator = Operator(settings, kube.guarded(leader.token), stores, telemetry, tls)
    lifetime = Lifetime(operator, leader, telemetry)
    try:
        handlers = registry(operator.on_event, lifetime.start, lifetime.end)
        await operate(handlers, settings.identity, lifetime.stop)
        if lifetime.error is not None:
            raise lifetime.error
    finally:
        await stores.aclose()
        await kube.close()


def main() -> None:
    """Start the operator."""
    settings = CliApp.run(Settings)
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for chatty in ("kopf.objects", "kopf.activities", "kopf._core.reactor.running"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    asyncio.run(run(settings))


if __name__ == "__main__":
    main()
