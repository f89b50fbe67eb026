"""What can happen to a job's agent, its engine, its pod and its Redis: the adapter has the bits of an undisturbed
job's. An agent that is killed is one of test_job's.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from job_checks import assert_the_same, complete, job, ready
from system import AGENT, ENGINE, Cluster, example, step

pytestmark = [pytest.mark.e2e, pytest.mark.nightly]

SYSTEM = "coserve-system"
PAST_THE_LEASE_S = 20


def pause(cluster: Cluster, pod: dict[str, Any]) -> None:
    """Past the lease, so that the job runs elsewhere when the agent wakes."""
    uid = pod["metadata"]["uid"]
    for program in (AGENT, ENGINE):
        cluster.signal(uid, program, signal.SIGSTOP)
    time.sleep(PAST_THE_LEASE_S)
    for program in (AGENT, ENGINE):
        cluster.signal(uid, program, signal.SIGCONT)


def kill_the_engine(cluster: Cluster, pod: dict[str, Any]) -> None:
    cluster.signal(pod["metadata"]["uid"], ENGINE, signal.SIGKILL)


def empty_redis(cluster: Cluster, pod: dict[str, Any]) -> None:
    """It keeps nothing on a disk."""
    before = redis_pods(cluster)
    cluster.run("kubectl", "-n", SYSTEM, "delete", "pod", *before, "--force", "--grace-period=0")


def redis_pods(cluster: Cluster) -> list[str]:
    pods = cluster.items("pods", "-n", SYSTEM)
    return [pod["metadata"]["name"] for pod in pods if "redis" in pod["metadata"]["name"]]


def delete_by_force(cluster: Cluster, pod: dict[str, Any]) -> None:
    cluster.run("kubectl", "delete", "pod", pod["metadata"]["name"], "--force", "--grace-period=0")


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> dict[str, Any]:
    cluster.apply(example("endpoint.yaml"))
    cluster.wait("iep", "tiny", ready(2), "two ready agents", 240)
    cluster.apply(job("undisturbed"))
    return cluster.wait("ftj", "undisturbed", complete, "Complete", 240)


@pytest.mark.parametrize(
    "fault", [pause, kill_the_engine, empty_redis, delete_by_force], ids=lambda each: each.__name__
)
def test_it_costs_no_step_and_not_one_bit(
    cluster: Cluster, undisturbed: dict[str, Any], fault: Callable[[Cluster, dict[str, Any]], None]
) -> None:
    name = fault.__name__.replace("_", "-")
    cluster.wait("iep", "tiny", ready(2), "two ready agents", 240)
    cluster.apply(job(name))
    bound = cluster.wait("ftj", name, lambda body: step(body) >= 12, "step 12", 120)["status"]["binding"]
    [pod] = [each for each in cluster.items("pods") if each["metadata"]["name"] == bound["agent"]]
    fault(cluster, pod)
    done = cluster.wait("ftj", name, complete, "Complete", 300)
    if fault is not empty_redis:  # with the others it is bound anew
        assert done["status"]["binding"]["epoch"] > bound["epoch"]
    assert_the_same(cluster, undisturbed, done)
