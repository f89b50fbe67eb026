"""A Redis for each namespace with endpoints: made here, kept as it should be, and taken away some time after the last
endpoint went.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from coserve_operator.apply.hindrances import Hindrances
from coserve_operator.apply.objects import Applier
from coserve_operator.decide.observed import Obstacle
from coserve_operator.kube import DEPLOYMENT, ENDPOINT, SECRET, SERVICE_ACCOUNT, Kind, Kube, KubeError, Manifest
from coserve_operator.manifests.metadata import APP
from coserve_operator.manifests.tenant_redis import REDIS_APP, TENANT, TenantRedisParts, beside, deployment
from coserve_operator.redis.stores import Stores
from coserve_operator.settings import Settings, TenantRedis
from coserve_operator.tenants import redis_password
from coserve_operator.tls import RedisTls
from coserve_operator.watch.cache import Cache
from coserve_operator.watch.views import deployment_counts, replica_failure

logger = logging.getLogger(__name__)

UNUSED_S = 300.0
"""How long the Redis of a namespace stays without an endpoint."""
LOOK_EVERY_S = 10.0


class TenantRedisKeeper:
    """Looks at all tenants when something has changed, and now and then. `clock` is monotonic."""

    def __init__(
        self,
        kube: Kube,
        settings: Settings,
        how: TenantRedis,
        tls: RedisTls,
        cache: Cache,
        stores: Stores,
        clock: Callable[[], float],
    ) -> None:
        self._kube, self._settings, self._how, self._tls = kube, settings, how, tls
        self._cache, self._stores, self._clock = cache, stores, clock
        self._applier = Applier(kube, clock)
        self._unused_since: dict[str, float] = {}
        self._changed = asyncio.Event()
        self._said: dict[str, str] = {}

    def on_event(self, kind: Kind, type_: str | None, body: Manifest) -> None:
        """Take an event of a watch."""
        metadata = body["metadata"]
        if kind is ENDPOINT and type_ in ("ADDED", "DELETED"):
            self._changed.set()
        if not self._is_ours(body):
            return
        if type_ == "DELETED":
            self._applier.forget(kind.name, metadata["namespace"], metadata["name"])
            self._changed.set()
        elif self._applier.observe(kind.name, body) is not None:
            self._changed.set()

    async def run(self) -> None:
        """Look again and again."""
        while True:
            self._changed.clear()
            try:
                await self.look()
            except KubeError as error:
                logger.warning("the tenants' Redis are put off: %s", error)
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S):
                    await self._changed.wait()

    async def look(self) -> None:
        """Bring each tenant's Redis to what it should be, whatever stands in the way of another's."""
        account = await self._kube.get(SERVICE_ACCOUNT, self._settings.namespace, self._settings.owner)
        tenants = self._cache.namespaces()
        there = {
            each["metadata"]["labels"].get(TENANT, ""): each
            for each in self._cache.deployments()
            if self._is_ours(each)
        }
        for tenant in sorted(tenants):
            hindrances = Hindrances()
            with hindrances:
                await self._ensure(tenant, account, there.get(tenant))
            self._tell(tenant, hindrances.obstacle or replica_failure(there.get(tenant)))
        for tenant, found in there.items():
            if tenant in tenants:
                self._unused_since.pop(tenant, None)
            elif self._clock() - self._unused_since.setdefault(tenant, self._clock()) >= UNUSED_S:
                await self._remove(tenant, found)

    async def _ensure(self, tenant: str, account: Manifest, there: Manifest | None) -> None:
        password = redis_password(self._settings.password or "", tenant)
        parts = TenantRedisParts(self._settings.namespace, tenant, self._how, password, self._tls.digest)
        if not deployment_counts(there)[2]:  # its pod may wait for a Secret that was deleted
            self._applier.forget(SECRET.name, self._settings.namespace, parts.secret_name)
        made = await self._applier.apply(deployment(parts, account), account["metadata"]["uid"])
        known = None if there is None else {"kind": DEPLOYMENT.name, **there}
        owner = made or known or await self._kube.get(DEPLOYMENT, self._settings.namespace, parts.name)
        for manifest in beside(parts, owner):
            await self._applier.apply(manifest, owner["metadata"]["uid"])

    async def _remove(self, tenant: str, found: Manifest) -> None:
        """Delete the Deployment: the garbage collector takes what it owns."""
        metadata = found["metadata"]
        logger.info("namespace %s has no endpoint any more: its Redis goes", tenant)
        await self._kube.delete(DEPLOYMENT, metadata["namespace"], metadata["name"], metadata["uid"])
        self._applier.forget(DEPLOYMENT.name, metadata["namespace"], metadata["name"])
        self._applier.forget_owner(metadata["uid"])
        self._unused_since.pop(tenant, None)
        await self._stores.drop(tenant)

    def _tell(self, tenant: str, obstacle: Obstacle | None) -> None:
        """Let the endpoints' conditions say why they have no Redis."""
        self._stores.of(tenant).obstacle = obstacle
        said = "" if obstacle is None else obstacle.message
        if said and said != self._said.get(tenant):
            logger.error("Redis of namespace %s: %s", tenant, said)
        self._said[tenant] = said

    def _is_ours(self, body: Manifest) -> bool:
        metadata = body["metadata"]
        labels = metadata.get("labels") or {}
        return metadata["namespace"] == self._settings.namespace and labels.get(APP) == REDIS_APP and TENANT in labels
