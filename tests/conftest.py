"""The real servers that tests talk to, on free ports of 127.0.0.1 and ended by process id: Redis, kube-apiserver."""

from __future__ import annotations

import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, settings
from redis.asyncio import Redis

from coserve_contract.connect import command, connect

ROOT = Path(__file__).parents[1]
settings.register_profile("no clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no clock")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def program(arguments: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program until the block ends; its output goes to `log`."""
    with log.open("wb") as output:
        process = subprocess.Popen(arguments, stdout=output, stderr=subprocess.STDOUT, cwd=log.parent)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, seconds: float = 60) -> None:
    """Wait for a server; if it ends or takes too long, the failure shows the end of its log."""
    deadline = time.monotonic() + seconds
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
            raise RuntimeError(f"{process.args!r} did not become ready (exit status {process.poll()}):\n{tail}")
        time.sleep(0.05)


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="session")
def servers() -> SimpleNamespace:
    """The helpers above, for tests that start a server of their own."""
    return SimpleNamespace(
        free_port=free_port,
        program=program,
        wait_until=wait_until,
        answers=answers,
        kubernetes=kubernetes,
        redis=run_redis,
    )


@dataclass(frozen=True)
class RedisServer:
    """A redis-server; `password` is the default user's, who may do everything."""

    port: int
    password: str
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def connect(self, username: str | None = None, password: str | None = None) -> Redis:
        """A client as the given user, or as the default user."""
        return connect(self.url, username, password if username else self.password)


@contextmanager
def run_redis(folder: Path) -> Iterator[RedisServer]:
    """Run a redis-server, whose log is in `folder`."""
    found = shutil.which("redis-server")
    if found is None:
        raise RuntimeError("redis-server is missing: apt-get install redis-server")
    port, password = free_port(), secrets.token_hex(16)
    settings = {"port": str(port), "bind": "127.0.0.1", "requirepass": password, "save": "", "appendonly": "no"}
    arguments = [found, *(part for name, value in settings.items() for part in (f"--{name}", value))]
    with program(arguments, folder / "log") as process:
        wait_until(lambda: answers(port), process, folder / "log")
        yield RedisServer(port, password, process)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with run_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    """The default user's client of an empty Redis."""
    client = redis_server.connect()
    await command(client, "FLUSHALL")
    yield client
    await client.aclose()


@dataclass(frozen=True)
class ApiServer:
    """A kube-apiserver without controllers or nodes; `kubeconfig` is an administrator's."""

    kubeconfig: Path
    kubectl_program: Path

    def kubectl(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run kubectl; the caller looks at returncode, stdout and stderr."""
        words = [str(self.kubectl_program), "--kubeconfig", str(self.kubeconfig), *arguments]
        return subprocess.run(words, input=stdin, capture_output=True, text=True, timeout=120, check=False)


def cluster_programs() -> Path:
    """The folder of the development cluster's programs, built first where they are missing (minutes, once)."""
    script = ROOT / "hack" / "cluster"
    folder = Path(subprocess.run([script, "bin"], capture_output=True, text=True, check=True).stdout.strip())
    if not all((folder / name).exists() for name in ("etcd", "kube-apiserver", "kubectl")):
        subprocess.run([script, "build"], check=True)
    return folder


@contextmanager
def kubernetes(folder: Path, *flags: str) -> Iterator[ApiServer]:
    """Run etcd and a kube-apiserver, with more flags for that one; everything of theirs is in `folder`."""
    programs = cluster_programs()
    etcd_port, peer_port, port, token = free_port(), free_port(), free_port(), secrets.token_hex(16)
    etcd_url, peer_url = f"http://127.0.0.1:{etcd_port}", f"http://127.0.0.1:{peer_port}"
    (folder / "tokens.csv").write_text(f"{token},admin,admin,system:masters\n")
    (folder / "tokens.csv").chmod(0o600)
    key = folder / "service-account.key"
    subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
    etcd = [
        *(str(programs / "etcd"), "--data-dir", str(folder / "etcd"), "--unsafe-no-fsync", "--log-level", "error"),
        *("--listen-client-urls", etcd_url, "--advertise-client-urls", etcd_url, "--listen-peer-urls", peer_url),
        *("--initial-advertise-peer-urls", peer_url, "--initial-cluster", f"default={peer_url}"),
    ]
    server = [
        *(
            str(programs / "kube-apiserver"),
            "--etcd-servers",
            etcd_url,
            "--token-auth-file",
            str(folder / "tokens.csv"),
        ),
        *("--bind-address", "127.0.0.1", "--secure-port", str(port), "--cert-dir", str(folder / "certificates")),
        *("--service-account-key-file", str(key), "--service-account-signing-key-file", str(key)),
        *("--service-account-issuer", "https://kubernetes.default.svc", "--authorization-mode", "RBAC"),
        *(
            "--service-cluster-ip-range",
            "10.96.0.0/16",
            "--advertise-address",
            "127.0.0.1",
            "--endpoint-reconciler-type",
            "none",
        ),
        *flags,
    ]
    kubeconfig = folder / "kubeconfig"
    kubeconfig.write_text(
        f"""apiVersion: v1
kind: Config
clusters:
- name: test
  cluster: {{server: "https://127.0.0.1:{port}", certificate-authority: {folder}/certificates/apiserver.crt}}
users: [{{name: admin, user: {{token: {token}}}}}]
contexts: [{{name: test, context: {{cluster: test, user: admin}}}}]
current-context: test
"""
    )
    kubeconfig.chmod(0o600)
    api = ApiServer(kubeconfig, programs / "kubectl")
    with program(etcd, folder / "etcd.log") as etcd_process:
        wait_until(lambda: answers(etcd_port), etcd_process, folder / "etcd.log")
        with program(server, folder / "apiserver.log") as process:
            wait_until(lambda: answers(port), process, folder / "apiserver.log")
            ready = ("get", "--raw", "/readyz")
            wait_until(lambda: api.kubectl(*ready).returncode == 0, process, folder / "apiserver.log")
            yield api


@pytest.fixture(scope="session")
def api_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with kubernetes(tmp_path_factory.mktemp("apiserver")) as api:
        yield api
