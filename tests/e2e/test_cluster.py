"""The development cluster itself: two side by side, and nothing left behind, also after a start that was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from system import ROOT, Cluster

pytestmark = pytest.mark.e2e
CLUSTER = ROOT / "hack/cluster"


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """The state folder of a second cluster, taken down whatever happens."""
    folder = tmp_path / "cluster"
    yield folder
    subprocess.run([CLUSTER, "down"], env=environment(folder), check=True, capture_output=True, timeout=120)


def environment(state: Path) -> dict[str, str]:
    return os.environ | {"COSERVE_CLUSTER_STATE": str(state)}


def left_behind(state: Path) -> list[str]:
    """Processes, mounts and cgroups of the cluster at `state`, seen from outside it."""
    found = []
    own = {os.getpid(), os.getppid()}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) not in own:
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(state) in command:
                found.append(f"process {entry.name}: {command[:100]}")
    found += [line for line in Path("/proc/mounts").read_text().splitlines() if str(state) in line]
    identity = subprocess.run(
        ["bash", "-c", f'HACK={ROOT}/hack; . "$HACK/lib/common.sh"; echo "$ID"'],
        env=environment(state),
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    assert identity.startswith("coserve-")
    return found + [str(path) for path in Path("/sys/fs/cgroup").glob(f"**/*{identity}*")]


def test_a_second_cluster_lives_beside_the_first_and_goes_without_a_trace(cluster: Cluster, state: Path) -> None:
    subprocess.run([CLUSTER, "up", "--nodes", "1"], env=environment(state), check=True, timeout=180)
    second = ["run", "kubectl", "get", "nodes", "-o", "name"]
    nodes = subprocess.run(
        [CLUSTER, *second], env=environment(state), check=True, capture_output=True, text=True
    ).stdout
    assert nodes.split() == ["node/dev-1"]
    assert left_behind(state)
    subprocess.run([CLUSTER, "down"], env=environment(state), check=True, timeout=120)
    assert left_behind(state) == []
    assert cluster.run("kubectl", "get", "nodes", "-o", "name").split() == ["node/dev-1", "node/dev-2"]


def test_down_after_a_start_that_was_killed_leaves_nothing(state: Path) -> None:
    start = subprocess.Popen([CLUSTER, "up"], env=environment(state), start_new_session=True)
    deadline = time.monotonic() + 60
    while not any("apiserver" in line for line in left_behind(state)):  # in the middle: the API server has begun
        assert time.monotonic() < deadline and start.poll() is None
        time.sleep(0.1)
    os.killpg(start.pid, signal.SIGKILL)
    start.wait()
    subprocess.run([CLUSTER, "down"], env=environment(state), check=True, timeout=120)
    assert left_behind(state) == []
