"""Kubernetes objects as the decisions see them: what of a pod, a Deployment, a feeder or an autoscaler matters."""

import re
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from coserve_operator.decide.observed import FeederView, Obstacle, PodView, RolloutView
from coserve_operator.decide.obstacles import LONGEST_MESSAGE, pods_refused
from coserve_operator.kube import Manifest
from coserve_operator.manifests.feeder import CHECK, INPUTS, PURPOSE, REDIS_SECRET
from coserve_operator.manifests.metadata import BUILDER, IN_TURN, JOBS, LEAVING, MADE_FROM, TEMPLATE

_REASONED = re.compile(r"\s*([A-Z][A-Za-z]{2,62}): (.*)", re.DOTALL)
_CREATING = {"ContainerCreating", "PodInitializing"}
_BAD_WAITS = {
    "ImagePullBackOff", "ErrImagePull", "InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError",
    "CreateContainerError", "RunContainerError",
}  # fmt: skip


def pod_view(pod: Manifest) -> PodView:
    """Return an agent's pod."""
    metadata, status = pod["metadata"], pod.get("status", {})
    conditions = {each["type"]: each for each in status.get("conditions") or []}
    annotations = metadata.get("annotations") or {}
    return PodView(
        name=metadata["name"],
        uid=metadata["uid"],
        ready=conditions.get("Ready", {}).get("status") == "True",
        deleting=metadata.get("deletionTimestamp") is not None or status.get("phase") in ("Succeeded", "Failed"),
        disrupted=conditions.get("DisruptionTarget", {}).get("status") == "True",
        scheduled=bool(pod.get("spec", {}).get("nodeName")),
        leaving_since=_seconds(annotations.get(LEAVING)),
        trouble=pod_trouble(pod),
        template=annotations.get(TEMPLATE, ""),
        creating_since=_creating_since(status, conditions.get("PodScheduled", {})),
    )


def _creating_since(status: dict[str, Any], scheduled: dict[str, Any]) -> float | None:
    """Return since when a pod's containers are being made. What keeps them, as a volume may, only events tell."""
    found = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
    waiting = {((each.get("state") or {}).get("waiting") or {}).get("reason") for each in found}
    since = scheduled.get("lastTransitionTime")
    if scheduled.get("status") != "True" or not since or not waiting or not waiting <= _CREATING:
        return None
    return datetime.fromisoformat(since).timestamp()


def pod_trouble(pod: Manifest) -> tuple[str, str] | None:
    """Return why a pod does not start, as a reason and a message; None while nothing speaks against it.

    A program that ends with the line `Reason: message` in its termination message is taken at its word.
    """
    status, name = pod.get("status", {}), pod["metadata"]["name"]
    for container in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
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
    annotations = metadata.get("annotations") or {}
    ends = {each["type"]: each for each in status.get("conditions") or [] if each.get("status") == "True"}
    seen = [pod_view(pod) for pod in pods]
    troubles = [pod.trouble for pod in seen if pod.trouble is not None]
    failure, failed_at = None, 0.0
    if "Failed" in ends:
        failure = troubles[-1][1] if troubles else ends["Failed"].get("message") or "it failed without a message"
        since = ends["Failed"].get("lastTransitionTime")
        failed_at = datetime.fromisoformat(since).timestamp() if since else 0.0
    return FeederView(
        uid=metadata["uid"],
        inputs=annotations.get(INPUTS, ""),
        secret=annotations.get(REDIS_SECRET, ""),
        checks=annotations.get(PURPOSE) == CHECK,
        suspended=bool(job.get("spec", {}).get("suspend")),
        finished=bool(ends.keys() & {"Complete", "Failed"}),
        active=status.get("active", 0) > 0,
        failure=failure,
        failed_at=failed_at,
        trouble=_of_feeder(troubles[-1]) if troubles else None,
        creating=next((pod for pod in seen if pod.creating_since is not None), None),
        podless=not (ends or status.get("active") or job.get("spec", {}).get("suspend")),
    )


def _of_feeder(trouble: tuple[str, str]) -> tuple[str, str]:
    """Return the trouble of a pod; a program's last line may begin with any word, which makes no reason."""
    reason, message = trouble
    return reason if reason in _BAD_WAITS | {"Unschedulable", "SchedulerError"} else "FeederFailed", message


def replica_failure(deployment: Manifest | None) -> Obstacle | None:
    """Return why a Deployment's controller cannot make its pods: a quota, a limit range, an admission policy."""
    conditions = (deployment or {}).get("status", {}).get("conditions") or []
    failed = next((each for each in conditions if each["type"] == "ReplicaFailure" and each["status"] == "True"), None)
    return None if failed is None else pods_refused(failed.get("message", ""))


def deployment_counts(deployment: Manifest | None) -> tuple[int | None, int, int]:
    """Return (wanted, existing, ready) agents; wanted is None where there is no Deployment."""
    if deployment is None:
        return None, 0, 0
    status = deployment.get("status", {})
    return deployment["spec"].get("replicas", 1), status.get("replicas", 0), status.get("readyReplicas", 0)


def rollout_view(deployment: Manifest | None) -> RolloutView | None:
    """Return what a Deployment was made from, and whether all its agents are."""
    if deployment is None:
        return None
    metadata, status = deployment["metadata"], deployment.get("status", {})
    annotations, wanted = metadata.get("annotations") or {}, deployment["spec"].get("replicas", 1)
    jobs = annotations.get(JOBS, "")
    newest = status.get("observedGeneration", 0) >= metadata.get("generation", 0)
    replaced = status.get("updatedReplicas", 0) >= max(wanted, status.get("replicas", 0))
    return RolloutView(
        made_from=annotations.get(MADE_FROM, ""),
        builder=annotations.get(BUILDER, ""),
        jobs=int(jobs) if jobs.isdecimal() and len(jobs) < 4 else 0,
        in_turn=IN_TURN in annotations,
        serves=status.get("readyReplicas", 0) > 0,
        complete=newest and replaced and status.get("availableReplicas", 0) >= wanted,
    )


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
