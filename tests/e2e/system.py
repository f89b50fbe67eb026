"""A development cluster of the tests' own: kubectl, clients in its network, and the examples adapted to its images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from demo.cluster import manifest

ROOT = Path(__file__).parents[2]
STATE = ROOT / ".cache" / "test-cluster"
AGENT, ENGINE = b"coserve_agent.main", b"spawn_main"
"""Parts of the command lines of an agent's processes."""


class Cluster:
    """kubectl, and programs in the cluster's network."""

    def __init__(self, state: Path = STATE) -> None:
        self.state, self.volumes = state, state / "volumes"
        self.environment = os.environ | {"COSERVE_CLUSTER_STATE": str(state)}

    def script(self, name: str, *arguments: str, seconds: float = 1500, checkout: Path = ROOT) -> None:
        """Run one of hack/'s scripts, of another checkout where one is given; its output goes to this process's."""
        command = [str(checkout / "hack" / name), *arguments]
        subprocess.run(command, env=self.environment, check=True, timeout=seconds)

    def run(self, *command: str, stdin: str | None = None, check: bool = True) -> str:
        """Run a command in the cluster's network."""
        done = subprocess.run(
            [str(ROOT / "hack/cluster"), "run", *command],
            env=self.environment,
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{' '.join(command)}: {done.stderr or done.stdout}")
        return done.stdout

    def python(self, script: str, *arguments: str, check: bool = True) -> str:
        """Run a script of this folder as a client in the cluster's network."""
        return self.run(sys.executable, str(Path(__file__).parent / script), *arguments, check=check)

    def background(self, script: str, *arguments: str) -> subprocess.Popen[str]:
        """Start a script of this folder; the caller waits for it with communicate(), or ends it."""
        command = [str(ROOT / "hack/cluster"), "run", sys.executable, str(Path(__file__).parent / script), *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self.environment, stdin=pipe, stdout=pipe, text=True)

    def apply(self, body: dict[str, Any]) -> None:
        self.run("kubectl", "apply", "-f", "-", stdin=json.dumps(body))

    def get(self, kind: str, name: str, namespace: str = "default") -> dict[str, Any]:
        body: dict[str, Any] = json.loads(self.run("kubectl", "-n", namespace, "get", kind, name, "-o", "json"))
        return body

    def items(self, kind: str, *arguments: str) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = json.loads(self.run("kubectl", "get", kind, "-o", "json", *arguments))["items"]
        return items

    def wait(
        self, kind: str, name: str, done: Callable[[dict[str, Any]], bool], what: str, seconds: float = 180
    ) -> dict[str, Any]:
        """Poll an object until `done`; fails with its status when that takes too long."""
        deadline = time.monotonic() + seconds
        while True:
            body = self.get(kind, name)
            if done(body):
                return body
            if time.monotonic() > deadline:
                described = self.run("kubectl", "describe", kind, name, check=False)
                pytest.fail(f"{kind}/{name}: {what} did not come within {seconds:.0f} s\n{described}")
            time.sleep(0.5)

    def signal(self, pod_uid: str, program: bytes, number: int) -> None:
        """Send a signal to the processes of a pod that have `program` in their command lines."""
        found = [
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and _is_of(entry, pod_uid, program)
        ]
        if not found:
            raise AssertionError(f"no {program.decode()} in pod {pod_uid}")
        for process in found:
            os.kill(process, number)


def _is_of(entry: Path, pod_uid: str, program: bytes) -> bool:
    try:
        return program in (entry / "cmdline").read_bytes() and pod_uid in (entry / "cgroup").read_text().replace(
            "_", "-"
        )
    except OSError:
        return False


def step(body: dict[str, Any]) -> int:
    """Optimizer steps that a FinetuneJob's status reports."""
    return int(body.get("status", {}).get("progress", {}).get("step", 0))


def example(name: str, **spec: Any) -> dict[str, Any]:
    """An example's object with parts of its spec replaced; an endpoint runs on the cluster's thin image."""
    body = manifest(ROOT / "examples" / name, mounted_environment=True)
    for key, value in spec.items():
        part = body["spec"].get(key)
        body["spec"][key] = part | value if isinstance(part, dict) and isinstance(value, dict) else value
    return body
