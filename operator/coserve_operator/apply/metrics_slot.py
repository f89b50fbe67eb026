"""The APIService of custom.metrics.k8s.io: a ready server makes it, and the leading operator takes it away when it has
had no server for half a minute, since every deletion of a namespace in the cluster waits for one.
"""

import asyncio
import logging
from collections.abc import Callable

from coserve_operator.decide.metrics_slot import API_SERVICES, GROUP, VERSION, MetricsSlot, Service, slot_of
from coserve_operator.kube import API_SERVICE, Kube, KubeError, Manifest, NotFoundError

logger = logging.getLogger(__name__)

UNAVAILABLE_S, LOOK_EVERY_S = 30.0, 2.0
"""A deletion of a namespace asks again after 41, 82 and 142 s (its controller's back-off): before the first."""


async def read_api_services(kube: Kube) -> list[Manifest]:
    """Return those of API_SERVICES that there are, ours first."""
    found = []
    for name in API_SERVICES:
        try:
            found.append(await kube.get(API_SERVICE, None, name))
        except NotFoundError:
            continue
    return found


def api_service(service: Service, port: int, ca_bundle: str, owner: Manifest) -> Manifest:
    """Return our APIService; it goes with `owner`, a ClusterRole. `ca_bundle` is in base64."""
    metadata = owner["metadata"]
    reference = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "name": metadata["name"],
        "uid": metadata["uid"],
    }
    return {
        "apiVersion": API_SERVICE.api_version,
        "kind": API_SERVICE.name,
        "metadata": {
            "name": API_SERVICES[0],
            "labels": {"app.kubernetes.io/part-of": "coserve", "app.kubernetes.io/managed-by": service[1]},
            "ownerReferences": [reference],
        },
        "spec": {
            "group": GROUP,
            "version": VERSION,
            "groupPriorityMinimum": 100,
            "versionPriority": 200,
            "caBundle": ca_bundle,
            "service": {"namespace": service[0], "name": service[1], "port": port},
        },
    }


class MetricsSlotKeeper:
    """Knows the slot, and clears it of an APIService of ours that has no server. `on_change` is called with each change
    of who has it.
    """

    def __init__(
        self, kube: Kube, ours: Service | None, clock: Callable[[], float], on_change: Callable[[], None]
    ) -> None:
        self._kube, self._ours, self._clock, self._on_change = kube, ours, clock, on_change
        self._down_since: float | None = None
        self.slot = MetricsSlot(ours)

    async def look(self) -> None:
        """Read the slot once, and clear it when it is time."""
        found = await read_api_services(self._kube)
        before, self.slot = self.slot, slot_of(found, self._ours)
        if before.obstacle != self.slot.obstacle:
            self._on_change()
        if not self.slot.registered or self.slot.available:
            self._down_since = None
        elif self._down_since is None:
            self._down_since = self._clock()
        elif self._clock() - self._down_since >= UNAVAILABLE_S:
            logger.warning(
                "APIService %s has had no server for %.0f s: it is taken away", API_SERVICES[0], UNAVAILABLE_S
            )
            await self._kube.delete(API_SERVICE, None, API_SERVICES[0], found[0]["metadata"]["uid"])
            self._down_since = None

    async def run(self) -> None:
        """Look again and again."""
        while True:
            try:
                await self.look()
            except KubeError as error:
                logger.warning("who serves %s is not known: %s", GROUP, error)
            await asyncio.sleep(LOOK_EVERY_S)
