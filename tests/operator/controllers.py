"""The controllers of a real cluster, and the kubelet as far as these tests need one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from live_operator import Cluster

CONTROLLERS = (
    "deployment-controller", "replicaset-controller", "job-controller", "resourcequota-controller",
    "serviceaccount-controller", "garbage-collector-controller",
)  # fmt: skip


@contextmanager
def controller_manager(api_server: Any, servers: Any, folder: Path) -> Iterator[None]:
    """Run kube-controller-manager, as the administrator."""
    port, kubeconfig = servers.free_port(), api_server.kubeconfig
    key = kubeconfig.parent / "service-account.key"
    words = [
        *(str(api_server.kubectl_program.parent / "kube-controller-manager"), "--kubeconfig", str(kubeconfig)),
        *("--service-account-private-key-file", str(key), "--leader-elect=false", "--bind-address", "127.0.0.1"),
        *("--secure-port", str(port), "--cert-dir", str(folder), "--controllers", ",".join(CONTROLLERS)),
    ]
    with servers.program(words, folder / "controllers.log") as process:
        servers.wait_until(lambda: servers.answers(port), process, folder / "controllers.log")
        yield


def pods(cluster: Cluster, app: str = "coserve-agent") -> list[dict[str, Any]]:
    """The agents' pods that are not going."""
    found = json.loads(cluster.kubectl("get", "pods", "-l", f"app.kubernetes.io/name={app}", "-o", "json"))["items"]
    return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]


def image(pod: dict[str, Any]) -> str:
    return str(pod["spec"]["containers"][0]["image"])


def make_ready(cluster: Cluster, pod: dict[str, Any]) -> None:
    """What a kubelet says of a pod that runs and passes its probe."""
    conditions = [{"type": kind, "status": "True"} for kind in ("Ready", "ContainersReady", "PodScheduled")]
    say(cluster, pod, {"phase": "Running", "conditions": conditions, "containerStatuses": None})


def cannot_pull(cluster: Cluster, pod: dict[str, Any]) -> None:
    """What a kubelet says of a pod whose image is not there."""
    name = image(pod)
    waiting = {"reason": "ImagePullBackOff", "message": f'Back-off pulling image "{name}": not found'}
    container = {
        "name": pod["spec"]["containers"][0]["name"], "image": name, "imageID": "", "ready": False, "restartCount": 0,
        "state": {"waiting": waiting},
    }  # fmt: skip
    say(cluster, pod, {"phase": "Pending", "containerStatuses": [container]})


def say(cluster: Cluster, pod: dict[str, Any], status: dict[str, Any]) -> None:
    body = json.dumps({"status": status})
    cluster.kubectl("patch", "pod", pod["metadata"]["name"], "--subresource=status", "--type=merge", "-p", body)


def cannot_mount(cluster: Cluster, pod: dict[str, Any]) -> None:
    """What a kubelet says, by an event alone, of a pod that names a Secret that is not there."""
    container = {
        "name": pod["spec"]["containers"][0]["name"], "image": image(pod), "imageID": "", "ready": False,
        "restartCount": 0, "state": {"waiting": {"reason": "ContainerCreating"}},
    }  # fmt: skip
    scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2026-11-21T12:00:00Z"}
    say(cluster, pod, {"phase": "Pending", "containerStatuses": [container], "conditions": [scheduled]})
    meta = pod["metadata"]
    event = {
        "apiVersion": "v1", "kind": "Event", "type": "Warning", "reason": "FailedMount", "count": 1,
        "metadata": {"name": f"{meta['name']}.1", "namespace": cluster.namespace},
        "message": 'MountVolume.SetUp failed for volume "x" : secret "gone" not found',
        "involvedObject": {"kind": "Pod", "name": meta["name"], "namespace": cluster.namespace, "uid": meta["uid"]},
    }  # fmt: skip
    cluster.kubectl("create", "-f", "-", stdin=json.dumps(event))
