"""Kubernetes objects as the decisions see them: what of a pod, a Deployment, a feeder or an autoscaler matters."""

import re
from collections.abc import Iterable
from typing import Any

from coserve_operator.kube import Manifest
from coserve_operator.reconcile.observed import FeederView, PodView
from coserve_operator.resources.feeder import INPUTS
from coserve_operator.resources.metadata import LEAVING

_REASONED = re.compile(r"\s*([A-Z][A-Za-z]{2,62}): (.*)", re.DOTALL)
_BAD_WAITS = {
    "ImagePullBackOff", "ErrImagePull", "InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError",
    "CreateContainerError", "RunContainerError",
}  # fmt: skip
LONGEST_MESSAGE = 1000
"""A plan of memory that does not fit names every part and every remedy."""


def pod_view(pod: Manifest) -> PodView:
    """Return an agent's pod."""
    metadata, status = pod["metadata"], pod.get("status", {})
    conditions = {each["type"]: each for each in status.get("conditions") or []}
    leaving = (metadata.get("annotations") or {}).get(LEAVING)
    return PodView(
        name=metadata["name"],
        uid=metadata["uid"],
        ready=conditions.get("Ready", {}).get("status") == "True",
        deleting=metadata.get("deletionTimestamp") is not None or status.get("phase") in ("Succeeded", "Failed"),
        scheduled=bool(pod.get("spec", {}).get("nodeName")),
        leaving_since=_seconds(leaving),
        trouble=pod_trouble(pod),
    )


def pod_trouble(pod: Manifest) -> tuple[str, str] | None:
    """Return why a pod does not start, as a reason and a message; None while nothing speaks against it.

    A program that ends with the line `Reason: message` in its termination message is taken at its word.
    """
    status, name = pod.get("status", {}), pod["metadata"]["name"]
    for container in status.get("containerStatuses") or []:
        waiting = container.get("state", {}).get("waiting") or {}
        ended = container.get("state", {}).get("terminated") or container.get("lastState", {}).get("terminated")
        if ended and ended.get("exitCode") and not container.get("ready"):
            return _ending(name, ended)
        if waiting.get("reason") in _BAD_WAITS:
            return waiting["reason"], f"pod {name}: {waiting.get('message') or waiting['reason']}"[:LONGEST_MESSAGE]
    for condition in status.get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            reason = condition.get("reason") or "Unschedulable"
            return reason, f"pod {name}: {condition.get('message', '')}"[:LONGEST_MESSAGE]
    return None


def feeder_view(job: Manifest, pods: Iterable[Manifest]) -> FeederView:
    """Return a feeder from its Job and the Job's pods."""
    metadata, status = job["metadata"], job.get("status", {})
    ends = {each["type"]: each for each in status.get("conditions") or [] if each.get("status") == "True"}
    troubles = [trouble for trouble in map(pod_trouble, pods) if trouble is not None]
    failure = None
    if "Failed" in ends:
        failure = troubles[-1][1] if troubles else ends["Failed"].get("message") or "it failed without a message"
    return FeederView(
        uid=metadata["uid"],
        inputs=(metadata.get("annotations") or {}).get(INPUTS, ""),
        suspended=bool(job.get("spec", {}).get("suspend")),
        finished=bool(ends.keys() & {"Complete", "Failed"}),
        active=status.get("active", 0) > 0,
        failure=failure,
        trouble=troubles[-1] if troubles else None,
    )


def deployment_counts(deployment: Manifest | None) -> tuple[int | None, int, int]:
    """Return (wanted, existing, ready) agents; wanted is None where there is no Deployment."""
    if deployment is None:
        return None, 0, 0
    status = deployment.get("status", {})
    return deployment["spec"].get("replicas", 1), status.get("replicas", 0), status.get("readyReplicas", 0)


def autoscaler_report(autoscaler: Manifest | None) -> tuple[bool | None, str, str] | None:
    """Return what an HPA says of itself: whether it can scale, why not, and in its own words."""
    if autoscaler is None:
        return None
    conditions = {each["type"]: each for each in autoscaler.get("status", {}).get("conditions") or []}
    for kind in ("AbleToScale", "ScalingActive"):
        condition = conditions.get(kind)
        if condition is None:
            return None
        if condition["status"] != "True":
            return False, condition.get("reason") or "Unknown", condition.get("message", "")[:LONGEST_MESSAGE]
    return True, "ScalingActive", conditions["ScalingActive"].get("message", "")[:LONGEST_MESSAGE]


def _ending(pod: str, ended: dict[str, Any]) -> tuple[str, str]:
    text = (ended.get("message") or "").strip()
    line = text.splitlines()[-1] if text else ""
    reasoned = _REASONED.fullmatch(line)
    if reasoned is not None:
        return reasoned[1], reasoned[2][:LONGEST_MESSAGE]
    cause = ended.get("reason") or "Error"
    detail = f": {line}" if line else ""
    return "AgentFailed", f"pod {pod} ended with {cause} (exit code {ended.get('exitCode')}){detail}"[:LONGEST_MESSAGE]


def _seconds(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
