"""Events for `kubectl describe`: told after the status was written, and never a reason to fail."""

import logging
import secrets
from collections import OrderedDict
from datetime import UTC, datetime
from typing import Any

from coserve_operator.decide.observed import Event, Obstacle, PodView
from coserve_operator.decide.obstacles import LONGEST_MESSAGE, pods_refused
from coserve_operator.kube import EVENT, FIELD_MANAGER, Kind, Kube, KubeError, Manifest

logger = logging.getLogger(__name__)
_CREATES = ("FailedCreate", "SuccessfulCreate")
BURST, EVERY_S, REMEMBERED = 25, 300.0, 4096
"""Events about one object that are sent in a row, seconds until there is one more, and objects that are remembered:
what client-go's recorder allows. One that flaps would else fill etcd.
"""
SILENT_S = 20.0
"""After this time a pod whose containers are still being made is asked about."""


def event(kind: Kind, metadata: Any, notice: Event, now: datetime, instance: str) -> Manifest:
    """Return the Event object about the object with this metadata."""
    moment = now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "apiVersion": EVENT.api_version,
        "kind": EVENT.name,
        "metadata": {"name": f"{metadata.name[:200]}.{secrets.token_hex(8)}", "namespace": metadata.namespace},
        "involvedObject": {
            "apiVersion": kind.api_version,
            "kind": kind.name,
            "name": metadata.name,
            "namespace": metadata.namespace,
            "uid": metadata.uid,
        },
        "type": "Warning" if notice.warning else "Normal",
        "reason": notice.reason,
        "message": notice.message[:1024],
        "firstTimestamp": moment,
        "lastTimestamp": moment,
        "count": 1,
        "source": {"component": FIELD_MANAGER},
        "reportingComponent": FIELD_MANAGER,
        "reportingInstance": instance,
    }


class EventBudget:
    """How many events may still be sent about each object."""

    def __init__(self) -> None:
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def allows(self, uid: str, now_s: float) -> bool:
        """Return whether one more may be sent now, and count it."""
        left, since = self._left.pop(uid, (float(BURST), now_s))
        left = min(BURST, left + max(0.0, now_s - since) / EVERY_S)
        self._left[uid] = (left - 1 if left >= 1 else left, now_s)
        if len(self._left) > REMEMBERED:
            self._left.popitem(last=False)
        return left >= 1


class Recorder:
    """Sends events; one that cannot be sent, or is one too many, is only logged."""

    def __init__(self, kube: Kube, instance: str) -> None:
        self._kube = kube
        self._instance = instance
        self._budget = EventBudget()

    async def record(self, kind: Kind, metadata: Any, events: list[Event], now: datetime) -> None:
        """Send the events about one object."""
        for notice in events:
            logger.info("%s %s/%s: %s: %s", kind.name, metadata.namespace, metadata.name, notice.reason, notice.message)
            if not self._budget.allows(metadata.uid, now.timestamp()):
                continue
            try:
                await self._kube.create(event(kind, metadata, notice, now, self._instance))
            except KubeError as error:
                logger.warning("an event could not be recorded: %s", error)


class Listener:
    """Asks for what controllers and kubelets tell by events alone; where they cannot be had, nothing is known."""

    def __init__(self, kube: Kube) -> None:
        self._kube = kube

    async def of_pods_of(self, namespace: str, uid: str) -> Obstacle | None:
        """Return why a Job's controller cannot make its pods; None where it has not said so."""
        said = [each for each in await self._events_of(namespace, uid) if each.get("reason") in _CREATES]
        return pods_refused(said[-1].get("message", "")) if said and said[-1]["reason"] == "FailedCreate" else None

    async def of_pod(self, namespace: str, pod: PodView, now: datetime) -> tuple[str, str] | None:
        """Return why a pod's containers are not made, such as a Secret to be mounted that is not there."""
        if pod.creating_since is None or now.timestamp() - pod.creating_since < SILENT_S:
            return None
        said = [each for each in await self._events_of(namespace, pod.uid) if each.get("type") == "Warning"]
        return (said[-1]["reason"], f"pod {pod.name}: {said[-1].get('message')}"[:LONGEST_MESSAGE]) if said else None

    async def _events_of(self, namespace: str, uid: str) -> list[Manifest]:
        try:
            return await self._kube.events_of(namespace, uid)
        except KubeError as error:
            logger.warning("events could not be read: %s", error)
            return []
