"""What the demo does to a cluster and reads from it: objects through the API server, agents through their
Service and admin port.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kubernetes
import yaml

GROUP, VERSION = "coserve.dev", "v1alpha1"
NAMESPACE = "default"
ENDPOINTS, JOBS = "inferenceendpoints", "finetunejobs"

DEV_IMAGE = "localhost/coserve-agent-dev:dev"
DEV_TEMPLATE: dict[str, Any] = {
    "env": [{"name": "PYTHONPATH", "value": "/env/coserve:/env/site-packages"}],
    "volumes": [{"name": "env", "persistentVolumeClaim": {"claimName": "coserve-env", "readOnly": True}}],
    "volumeMounts": [{"name": "env", "mountPath": "/env", "readOnly": True}],
}
"""The development cluster's thin agent image finds its Python packages on a volume instead of carrying 4.5
GB of them.
"""


class DemoError(Exception):
    """The demo cannot go on; the message says what to look at."""


def manifest(path: Path, *, mounted_environment: bool) -> dict[str, Any]:
    """The object in `path`; an endpoint takes its packages from a volume where the cluster has only the thin image."""
    body: dict[str, Any] = yaml.safe_load(path.read_text())
    if body["kind"] == "InferenceEndpoint" and mounted_environment:
        spec = body["spec"]
        spec["image"], spec["template"] = DEV_IMAGE, {**spec.get("template", {}), **DEV_TEMPLATE}
        spec["finetuning"] = {**spec.get("finetuning", {}), "feeder": DEV_TEMPLATE}
    return body


def kubectl(*arguments: str, stdin: str | None = None) -> str:
    """Run kubectl; DemoError with what it said where it fails."""
    done = subprocess.run(["kubectl", *arguments], input=stdin, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DemoError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def condition(body: dict[str, Any], name: str) -> dict[str, Any]:
    """A condition of an object's status, or an empty one."""
    found = (c for c in body.get("status", {}).get("conditions", []) if c["type"] == name)
    return next(found, {})


@dataclass(frozen=True)
class Agent:
    """One agent pod and the addresses at which this process reaches it."""

    pod: str
    node: str
    api: str
    admin: str

    def get(self, path: str) -> Any:
        """JSON of the admin port; None where the agent does not answer."""
        try:
            with urllib.request.urlopen(f"{self.admin}{path}", timeout=2) as reply:
                return json.loads(reply.read())
        except (OSError, ValueError):
            return None


@dataclass
class Cluster:
    """The cluster of the current kubeconfig."""

    forwards: list[subprocess.Popen[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        kubernetes.config.load_kube_config()
        self._objects = kubernetes.client.CustomObjectsApi()
        self._core = kubernetes.client.CoreV1Api()

    def get(self, plural: str, name: str) -> dict[str, Any]:
        body: dict[str, Any] = self._objects.get_namespaced_custom_object(GROUP, VERSION, NAMESPACE, plural, name)
        return body

    def wait(
        self, plural: str, name: str, what: str, done: Callable[[dict[str, Any]], bool], seconds: float
    ) -> dict[str, Any]:
        """Poll an object until `done`, saying every 5 s where it stands."""
        started = said = time.monotonic()
        while True:
            body = self.get(plural, name)
            if done(body):
                return body
            now = time.monotonic()
            status = body.get("status", {})
            if now - said >= 5:
                said = now
                reasons = ", ".join(f"{c['type']}={c['status']} ({c['reason']})" for c in status.get("conditions", []))
                print(f"  {now - started:.0f} s: {what}: {reasons or 'no status yet'}", flush=True)
            if now - started > seconds:
                raise DemoError(f"{what} took more than {seconds:.0f} s; look at: kubectl describe {plural} {name}")
            time.sleep(0.5)

    def agents(self, endpoint: str) -> list[Agent]:
        """The agents in the endpoint's status, reached directly where pods are, else through port-forwards."""
        names = {agent["name"] for agent in self.get(ENDPOINTS, endpoint)["status"].get("agents", [])}
        pods = self._core.list_namespaced_pod(NAMESPACE, label_selector=f"coserve.dev/endpoint={endpoint}").items
        agents = []
        for pod in pods:
            if pod.metadata.name not in names or pod.metadata.deletion_timestamp is not None:
                continue
            address, name, node = pod.status.pod_ip, pod.metadata.name, pod.spec.node_name
            if _reachable(address, 8001):
                agents.append(Agent(name, node, f"http://{address}:8000", f"http://{address}:8001"))
            else:
                api, admin = self._forward(name)
                agents.append(Agent(name, node, f"http://127.0.0.1:{api}", f"http://127.0.0.1:{admin}"))
        return agents

    def base_urls(self, endpoint: str, agents: list[Agent]) -> list[str]:
        """Where clients send: the Service, or each agent in turn where the Service's address is not reachable from
        here.
        """
        address = self._core.read_namespaced_service(endpoint, NAMESPACE).spec.cluster_ip
        return [f"http://{address}"] if _reachable(address, 80) else [agent.api for agent in agents]

    def _forward(self, pod: str) -> tuple[int, int]:
        api, admin = _free_port(), _free_port()
        command = ["kubectl", "-n", NAMESPACE, "port-forward", f"pod/{pod}", f"{api}:8000", f"{admin}:8001"]
        self.forwards.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True))
        deadline = time.monotonic() + 15
        while not _reachable("127.0.0.1", admin):
            if time.monotonic() > deadline:
                raise DemoError(f"no way to pod {pod}: its address does not answer, nor does kubectl port-forward")
            time.sleep(0.1)
        return api, admin

    def close(self) -> None:
        for process in self.forwards:
            process.terminate()
            process.wait()


@contextmanager
def connected() -> Iterator[Cluster]:
    """A Cluster whose port-forwards end with the block."""
    cluster = Cluster()
    try:
        yield cluster
    finally:
        cluster.close()


def _reachable(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=3.0):
            return True
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
