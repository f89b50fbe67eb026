"""The real programs: etcd, kube-apiserver, Redis and the operator, each a process whose CPU time is read in /proc."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from kubernetes.aio import config
from kubernetes.aio.client import ApiClient, Configuration

from coserve_operator.kube import Kube

ROOT = Path(__file__).parents[2]
NAMESPACE = "bench"


def _helpers() -> ModuleType:
    """What the tests start servers with."""
    spec = importlib.util.spec_from_file_location("servers_of_tests", ROOT / "tests" / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Servers:
    """Where they are; `redis` is (URL, password), `api` asks by kubectl."""

    api: Any
    kubeconfig: Path
    redis: tuple[str, str]


@contextmanager
def servers(folder: Path) -> Iterator[Servers]:
    """Run etcd, kube-apiserver with our CRDs, and Redis."""
    tests, password = _helpers(), secrets.token_hex(16)
    port, found = tests.free_port(), shutil.which("redis-server")
    if found is None:
        raise SystemExit("redis-server is missing: apt-get install redis-server")
    words = [found, "--port", str(port), "--bind", "127.0.0.1", "--requirepass", password, "--save", ""]
    with tests.kubernetes(folder) as api, tests.program(words, folder / "redis.log") as redis:
        tests.wait_until(lambda: tests.answers(port), redis, folder / "redis.log")
        for path in sorted((ROOT / "crds").glob("*.yaml")):
            _do(api, "apply", "--server-side", "-f", str(path))
            _do(api, "wait", "--for=condition=Established", f"crd/{path.stem}.coserve.dev", "--timeout=60s")
        _do(api, "create", "namespace", NAMESPACE)
        lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "coserve-operator"}}
        _do(api, "-n", NAMESPACE, "apply", "-f", "-", stdin=json.dumps(lease))
        yield Servers(api, api.kubeconfig, (f"redis://127.0.0.1:{port}/0", password))


async def api_client(at: Servers) -> ApiClient:
    configuration = Configuration()
    await config.load_kube_config(str(at.kubeconfig), client_configuration=configuration)  # type: ignore[no-untyped-call]
    return ApiClient(configuration)


async def client(at: Servers) -> Kube:
    return Kube(await api_client(at))


@contextmanager
def operator(folder: Path, at: Servers, profile: str) -> Iterator[int]:
    """Run the operator; gives its process id. `profile` is a file for cProfile's figures, "" for none."""
    url, password = at.redis
    os.environ |= {
        "KUBECONFIG": str(at.kubeconfig),
        "COSERVE_REDIS_URL": url,
        "COSERVE_REDIS_PASSWORD": password,
        "COSERVE_ENDPOINT_KEY": "a key",
        "COSERVE_NAMESPACE": NAMESPACE,
        "COSERVE_HEALTH_PORT": "0",
        "COSERVE_METRICS_API_SERVICE": "",
        "COSERVE_LOG_LEVEL": "WARNING",
    }
    profiled = ["-m", "cProfile", "-o", profile] if profile else []
    words = [sys.executable, *profiled, "-m", "coserve_operator.main"]
    with _helpers().program(words, folder / "operator.log") as process:
        yield process.pid


def programs() -> dict[str, int]:
    """The process ids of what runs here, by name; this one is the agents and feeders."""
    found = {"players": os.getpid()}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rsplit(")", 1)
        except OSError:
            continue
        if int(fields[1].split()[1]) == os.getpid():
            words = (path / "cmdline").read_bytes().split(b"\0")
            name = "operator" if b"coserve_operator.main" in words else Path(words[0].decode()).name
            found[name] = int(path.name)
    return found


def api_calls(at: Servers) -> Counter[str]:
    """How often the API server has answered so far, by verb and resource."""
    calls = Counter[str]()
    for line in at.api.kubectl("get", "--raw", "/metrics").stdout.splitlines():
        if line.startswith("apiserver_request_total{"):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
            name = "/".join(filter(None, (labels["resource"], labels["subresource"])))
            calls[f"{labels['verb']} {name}"] += int(float(line.rsplit(" ", 1)[1]))
    return calls


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mib(pid: int) -> dict[str, float]:
    """Resident now, and at most."""
    told = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return {name: round(int(told[key].split()[0]) / 1024, 1) for name, key in (("now", "VmRSS"), ("most", "VmHWM"))}


def _do(api: Any, *words: str, stdin: str = "") -> None:
    done = api.kubectl(*words, stdin=stdin)
    if done.returncode:
        raise SystemExit(f"kubectl {' '.join(words)}: {done.stderr}")
