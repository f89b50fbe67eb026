"""Events for `kubectl describe`: told after the status was written, and never a reason to fail."""

import logging
import secrets
from datetime import UTC, datetime
from typing import Any

from coserve_operator.kube import EVENT, FIELD_MANAGER, Kind, Kube, KubeError, Manifest
from coserve_operator.reconcile.observed import Notice

logger = logging.getLogger(__name__)


def event(kind: Kind, metadata: Any, notice: Notice, now: datetime, instance: str) -> Manifest:
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


class Recorder:
    """Sends events; one that cannot be sent is only logged."""

    def __init__(self, kube: Kube, instance: str) -> None:
        self._kube = kube
        self._instance = instance

    async def tell(self, kind: Kind, metadata: Any, notices: list[Notice], now: datetime) -> None:
        """Send the notices about one object."""
        for notice in notices:
            logger.info("%s %s/%s: %s: %s", kind.name, metadata.namespace, metadata.name, notice.reason, notice.message)
            try:
                await self._kube.create(event(kind, metadata, notice, now, self._instance))
            except KubeError as error:
                logger.warning("an event could not be recorded: %s", error)
