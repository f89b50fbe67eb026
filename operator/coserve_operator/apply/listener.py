"""What controllers and kubelets tell by events alone. For each answer the API server looks through all events of a
namespace, so questions are few, however many objects wait.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from datetime import datetime

from coserve_operator.decide.observed import Obstacle, PodView
from coserve_operator.decide.obstacles import LONGEST_MESSAGE, pods_refused
from coserve_operator.kube import Kube, KubeError, Manifest

logger = logging.getLogger(__name__)
_CREATES = ("FailedCreate", "SuccessfulCreate")
SILENT_S = 20.0
"""After this time a pod whose containers are still being made is asked about."""
EVERY_S, REMEMBERED = 0.5, 1024
"""Seconds between two questions, and objects whose last answer is kept until the next."""


class Listener:
    """Asks for what is told by events; where they cannot be had, nothing is known."""

    def __init__(self, kube: Kube) -> None:
        self._kube = kube
        self._said: OrderedDict[str, Manifest | None] = OrderedDict()
        """By uid, in the order in which was asked."""
        self._next_s = 0.0

    async def of_pods_of(self, namespace: str, uid: str, now: datetime) -> Obstacle | None:
        """Return why a Job's controller cannot make its pods; None where it has not said so."""
        said = await self._last(namespace, uid, now, lambda each: each.get("reason") in _CREATES)
        return pods_refused(said.get("message", "")) if said and said["reason"] == "FailedCreate" else None

    async def of_pod(self, namespace: str, pod: PodView, now: datetime) -> tuple[str, str] | None:
        """Return why a pod's containers are not made, such as a Secret to be mounted that is not there."""
        if pod.creating_since is None or now.timestamp() - pod.creating_since < SILENT_S:
            return None
        said = await self._last(namespace, pod.uid, now, lambda each: each.get("type") == "Warning")
        return (said["reason"], f"pod {pod.name}: {said.get('message')}"[:LONGEST_MESSAGE]) if said else None

    async def _last(
        self, namespace: str, uid: str, now: datetime, wanted: Callable[[Manifest], bool]
    ) -> Manifest | None:
        """Return the last such event about an object, as of now or of when it was its turn."""
        if now.timestamp() < self._next_s:
            return self._said.get(uid)
        self._next_s = now.timestamp() + EVERY_S
        try:
            said = [each for each in await self._kube.events_of(namespace, uid) if wanted(each)]
        except KubeError as error:
            logger.warning("events could not be read: %s", error)
            return None
        self._said[uid] = said[-1] if said else None
        self._said.move_to_end(uid)
        if len(self._said) > REMEMBERED:
            self._said.popitem(last=False)
        return self._said[uid]
