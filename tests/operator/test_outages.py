"""What is away for a while, or taken away again and again, fails no job: a day in minutes, on a clock that is set."""

from __future__ import annotations

from typing import Any

import pytest
from test_simulation import Machine

from coserve_api.job_status import FailedReason
from coserve_contract.messages import Released

HALF_AN_HOUR_S = 1800


class World(Machine):
    """Two agents and two jobs at work."""

    def __init__(self, make: Any) -> None:
        Machine.make = make
        super().__init__()
        self.begin(replicas=2)
        for _ in range(2):
            self.create(shared=False)
        self.go(5)
        assert self.reasons() == ["Training", "Training"]

    def go(self, turns: int) -> None:
        """A turn takes a second."""
        for _ in range(turns):
            for name in self.names:
                self.feed(name)
            self.turn()
            self.statuses_only_go_forward()

    def statuses(self) -> list[dict[str, Any]]:
        return [self.kube.objects["FinetuneJob", name]["status"] for name in self.names]

    def reasons(self) -> list[str]:
        return [status["reason"] for status in self.statuses()]

    def given_back(self, reason: FailedReason) -> int:
        """Every job that runs meets the fault; return how many did."""
        running = [held for name in self.names if (held := self._running(name)) and held[0] not in self.store.results]
        for uid, fence in running:
            self.store.results[uid] = Released(epoch=fence.epoch, step=0, reason=reason, message="no space left")
        return len(running)


@pytest.fixture
def world(make: Any) -> World:
    return World(make)


@pytest.mark.parametrize(
    "reason", [FailedReason.ARTIFACT_STORE_ERROR, FailedReason.ENDPOINT_REJECTED, FailedReason.RANK_TOO_LARGE]
)
def test_an_artifact_store_that_is_away_for_half_an_hour(world: World, reason: FailedReason) -> None:
    attempts = 0
    for _ in range(HALF_AN_HOUR_S):
        attempts += world.given_back(reason)
        world.go(1)
    assert world.reasons() == ["BackingOff", "BackingOff"]
    first = world.statuses()[0]
    assert (first["backoff"]["reason"], first["backoff"].get("failures", 0)) == (reason, 0)
    bound = next(each for each in first["conditions"] if each["type"] == "Bound")
    assert (bound["status"], bound["reason"]) == ("False", "BackingOff")
    assert "no space left" in bound["message"]
    assert f"begins at {first['backoff']['until']}" in bound["message"]
    # at once, then after 10, 20, 40, 80, 160, 300, 300, ... seconds: 11 attempts of each job in half an hour
    assert 18 <= attempts <= 24
    world.go(330)
    assert world.reasons() == ["Training", "Training"]
    for name in world.names:
        world.save(name, 9)
    world.go(2)
    assert [status.get("backoff") for status in world.statuses()] == [None, None], "progress resets"


def test_our_own_fault_without_progress_ends_the_job_and_with_progress_does_not(world: World) -> None:
    one = world.names[0]
    for step in range(1, 6):
        world.given_back(FailedReason.INTERNAL_ERROR)
        world.go(100)
        world.save(one, step)
        world.go(100)
    first, second = world.statuses()
    assert first["reason"] == "Training"
    assert (second["state"], second["reason"]) == ("Failed", "BackoffLimitExceeded")
    failed = next(each for each in second["conditions"] if each["type"] == "Failed")
    assert "3 attempts failed since the checkpoint of step 0, and spec.backoffLimit is 2" in failed["message"]
    assert "no space left" in failed["message"]


@pytest.mark.parametrize("away", ["redis", "api server"])
def test_redis_or_the_api_server_away_for_half_an_hour(world: World, away: str) -> None:
    before = world.statuses()
    if away == "redis":
        world.store.fail_after = 0
    else:
        world.kube.away = True
    for _ in range(HALF_AN_HOUR_S):
        world.reconcile()
        world.store.fail_after = 0 if away == "redis" else None
    world.store.fail_after, world.kube.away = None, False
    world.go(5)
    after = world.statuses()
    assert [status["reason"] for status in after] == ["Training", "Training"]
    assert [status["binding"] for status in after] == [status["binding"] for status in before], "nothing was bound anew"


def test_twenty_pods_that_are_taken_away_count_for_nothing_and_a_crash_then_does(world: World) -> None:
    """Also without progress in between; a crash after a disruption is no disruption."""
    for _ in range(20):
        pod = world.statuses()[0]["binding"]["agent"]
        world._end(pod)
        world.go(320)
        assert world.reasons() == ["Training", "Training"]
    first = world.statuses()[0]
    assert (first["restarts"], first["backoff"]["attempts"], first["backoff"].get("failures", 0)) == (20, 20, 0)
    index = sorted(world.store.agents).index(world._running(world.names[0])[1].agent)  # type: ignore[index]
    world.restart_a_container(index)
    world.go(1)
    assert world.statuses()[0]["backoff"]["failures"] == 1


def test_suspending_a_job_that_waits_for_its_next_attempt_lets_it_begin_at_once(world: World) -> None:
    for _ in range(400):
        world.given_back(FailedReason.ARTIFACT_STORE_ERROR)
        world.go(1)
    assert world.reasons()[0] == "BackingOff"
    world.suspend(world.names[0], True)
    world.go(2)
    world.suspend(world.names[0], False)
    world.go(3)
    assert world.reasons()[0] == "Training"
