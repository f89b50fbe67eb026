"""Brings this server's API into the API server: only while the server is ready and nobody else serves it.

An APIService without a server holds up every deletion of a namespace. The operator takes one away that has had none for
half a minute; where the API server never reached us (a firewall between them), it is tried again ever more seldom.
"""

import asyncio
import logging
from base64 import b64encode
from collections.abc import Callable

from coserve_operator.apply.metrics_slot import api_service, read_api_services
from coserve_operator.decide.metrics_slot import API_SERVICES, slot_of
from coserve_operator.kube import CLUSTER_ROLE, POD, ConflictError, Kube, KubeError, Manifest
from coserve_operator.settings import MetricsApiSettings

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0
AGAIN_S, LONGEST_S = 300.0, 3600.0
CA = "ca.crt"


class Registration:
    """Applies the APIService again and again; `clock` is monotonic."""

    def __init__(self, kube: Kube, settings: MetricsApiSettings, clock: Callable[[], float]) -> None:
        self._kube, self._settings, self._clock = kube, settings, clock
        self._service = (settings.namespace, settings.service)
        self._attempts, self._not_before = 0, 0.0
        self._said = ""

    async def run(self) -> None:
        """Look until the end of the process."""
        while True:
            try:
                await self.look()
            except ConflictError:
                self._say("somebody else has changed the APIService")
            except KubeError as error:
                self._say(f"the APIService could not be applied: {error}")
            await asyncio.sleep(LOOK_EVERY_S)

    async def look(self) -> None:
        """Apply the APIService where it is free, or ours and not as it should be."""
        if not await self._is_ready():
            return
        found = await read_api_services(self._kube)
        slot = slot_of(found, self._service)
        if slot.others:
            self._say(f"{API_SERVICES[0]} is not made: {'/'.join(slot.others[0])} serves that API")
            return
        if slot.available:
            self._attempts, self._not_before = 0, 0.0
        if not slot.registered:
            if self._clock() < self._not_before:
                return
            self._not_before = self._clock() + min(LONGEST_S, AGAIN_S * 2**self._attempts)
            self._attempts += 1
        owner = await self._kube.get(CLUSTER_ROLE, None, self._settings.owner)
        bundle = await asyncio.to_thread((self._settings.certificates / CA).read_bytes)
        wanted = api_service(self._service, self._settings.service_port, b64encode(bundle).decode(), owner)
        if slot.registered and _holds(found[0], wanted):
            return
        # Under a manager of this Service's, and without force: of two that do it at once, one is refused.
        await self._kube.apply(wanted, manager=f"{self._settings.service}.{self._settings.namespace}", force=False)
        self._say(f"applied APIService {API_SERVICES[0]}")

    async def _is_ready(self) -> bool:
        """Return whether the kubelet takes this pod for ready, so that the Service leads to it."""
        pod = await self._kube.get(POD, self._settings.namespace, self._settings.identity)
        conditions = pod.get("status", {}).get("conditions") or []
        return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)

    def _say(self, text: str) -> None:
        if text != self._said:
            logger.info("%s", text)
        self._said = text


def _holds(found: Manifest, wanted: Manifest) -> bool:
    """Return whether all that is wanted is there."""
    return _part(found["spec"], wanted["spec"]) and _part(found["metadata"], wanted["metadata"])


def _part(found: object, wanted: object) -> bool:
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(_part(found.get(key), value) for key, value in wanted.items())
    if isinstance(wanted, list):
        return isinstance(found, list) and len(found) == len(wanted) and all(map(_part, found, wanted))
    return found == wanted
