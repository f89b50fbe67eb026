"""Events for `kubectl describe`: told after the status was written, and never a reason to fail."""

import logging
import secrets
from collections import OrderedDict
from datetime import UTC, datetime
from typing import Any

from coserve_operator.decide.observed import Event
from coserve_operator.kube import EVENT, FIELD_MANAGER, Kind, Kube, KubeError, Manifest

logger = logging.getLogger(__name__)
BURST, EVERY_S, REMEMBERED = 25, 300.0, 4096
"""Events about one object that are sent in a row, seconds until there is one more, and objects that are remembered:
what client-go's recorder allows. One that flaps would else fill etcd.
"""


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
