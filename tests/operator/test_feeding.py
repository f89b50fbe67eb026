"""Which waiting jobs hold a feeder, which data sets are checked, and what their conditions say."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest
from live_operator import SHA, Cluster, bound, eventually, feed
from operator_fakes import FakeKube, FakeStore

from coserve_api.conditions import condition, find_condition
from coserve_contract.connect import command
from coserve_contract.shards import Sample, Shard
from coserve_contract.store import JobRecord
from coserve_operator.apply.feeder import FeederApplier
from coserve_operator.decide import job as jobs
from coserve_operator.decide import job_status
from coserve_operator.decide.actions import ClearStreams, FeederAction
from coserve_operator.decide.claims import Claims
from coserve_operator.decide.decision import Decision, ObservedJob
from coserve_operator.decide.feeding import feed_the_next
from coserve_operator.decide.observed import FeederView, RedisView
from coserve_operator.manifests.feeder import feeder
from coserve_operator.settings import Settings
from coserve_operator.tenants import RedisAccess
from coserve_operator.watch.cache import Cache

RUN, CHECK, KEEP, REMOVE, RENEW, SUSPEND = (
    getattr(FeederAction, name) for name in ("RUN", "CHECK", "KEEP", "REMOVE", "RENEW", "SUSPEND")
)
READING = FeederView("f", "inputs", active=True)
CHECKING = replace(READING, checks=True)


class Queue:
    """Jobs of one endpoint, the first the oldest; `at` changes one."""

    def __init__(self, make: Any, count: int) -> None:
        self.make = make
        view, endpoint = RedisView("i"), make.endpoint()
        self.jobs = [
            ObservedJob(make.job(f"job-{n}", number=n), endpoint, Claims(), view, None, "inputs")
            for n in range(1, count + 1)
        ]

    def at(self, number: int, record: JobRecord | None = None, **changes: Any) -> Queue:
        old = self.jobs[number - 1]
        if record is not None:
            changes["redis"] = replace(old.redis, jobs={old.job.metadata.uid: record})
        self.jobs[number - 1] = replace(old, **changes)
        return self

    def checked(self, *numbers: int, **record: Any) -> Queue:
        for number in numbers:
            self.at(number, JobRecord(feed=self.make.feed(), **record))
        return self

    def decide(self, free: int = 0, checks: int = 2) -> list[Decision]:
        observations = {each.job.metadata.uid: each for each in self.jobs}
        decisions = {
            uid: jobs.assign(each, jobs.decide(each, self.make.NOW), {}, None, 0) for uid, each in observations.items()
        }
        return list(feed_the_next(observations, decisions, free, checks).values())

    def feeders(self, **bounds: int) -> list[FeederAction]:
        return [one.feeder for one in self.decide(**bounds)]

    def ready(self, number: int, **bounds: int) -> tuple[str, str, str]:
        """The state's reason, DataReady, and its message."""
        observed, decision = self.jobs[number - 1], self.decide(**bounds)[number - 1]
        said = find_condition(job_status.status_of(observed, decision, self.make.NOW).conditions, "DataReady")
        assert said is not None
        return decision.reason, said.status, said.message


def test_the_head_and_one_more_are_fed_and_two_of_the_others_checked(make: Any) -> None:
    assert Queue(make, 7).feeders() == [RUN, RUN, CHECK, CHECK, KEEP, KEEP, KEEP]
    assert Queue(make, 7).feeders(free=3) == [RUN, RUN, RUN, RUN, CHECK, CHECK, KEEP]
    assert Queue(make, 4).at(4, feeder=CHECKING).feeders(checks=1) == [RUN, RUN, KEEP, KEEP]


def test_what_is_checked_waits_without_a_feeder_and_keeps_its_condition(make: Any) -> None:
    queue = Queue(make, 5).checked(1, 2, 3, 4).at(3, feeder=CHECKING)
    assert queue.feeders() == [RUN, RUN, REMOVE, KEEP, CHECK]
    reason, status, message = queue.ready(4)
    assert (reason, status) == ("NoCapacity", "True")
    assert "80 samples" in message


def test_conditions_say_what_becomes_of_data_that_were_not_read(make: Any) -> None:
    queue = Queue(make, 4).at(3, feeder=CHECKING)
    assert queue.ready(1) == ("WaitingForData", "False", "the feeder reads the data set")
    assert queue.ready(3, checks=1) == ("WaitingForData", "False", "the data set is being checked")
    waiting = "the data set waits for its check: some are checked at a time"
    assert queue.ready(4, checks=1) == ("WaitingForData", "False", waiting)
    trouble = replace(CHECKING, trouble=("Unschedulable", "pod x: 0/1 nodes"))
    assert queue.at(3, feeder=trouble).ready(3)[2] == "the feeder cannot start: pod x: 0/1 nodes"


def test_a_job_whose_feeder_cannot_start_keeps_its_turn(make: Any) -> None:
    stuck = replace(READING, trouble=("ImagePullBackOff", "pod x: no such image"))
    queue = Queue(make, 4).at(1, feeder=stuck)
    assert queue.feeders()[:2] == [RUN, RUN]


def test_a_check_gives_way_when_its_job_is_next(make: Any) -> None:
    queue = Queue(make, 3).at(1, feeder=CHECKING)
    assert queue.feeders()[0] is RENEW
    assert queue.at(1, feeder=replace(CHECKING, finished=True)).feeders()[0] is RENEW
    assert queue.at(1, feeder=None).feeders()[0] is RUN


def test_a_check_whose_word_was_lost_is_made_anew(make: Any) -> None:
    queue = Queue(make, 3)
    assert queue.at(3, feeder=replace(CHECKING, finished=True)).feeders()[2] is RENEW
    assert queue.at(3, feeder=replace(CHECKING, inputs="others")).feeders()[2] is RENEW
    assert queue.at(3, feeder=replace(CHECKING, suspended=True)).feeders()[2] is CHECK
    assert queue.at(3, feeder=READING).feeders()[2] is KEEP, "one that feeds and has read nothing yet checks, too"


def test_an_emptied_redis_makes_no_check_anew(make: Any) -> None:
    queue = Queue(make, 3)
    ready = condition("DataReady", True, "DataRead", "80 samples", generation=1, now=make.NOW)
    job = make.job("job-3", number=3, status={"state": "Pending", "conditions": [ready.to_dict()]})
    assert queue.at(3, job=job).feeders()[2] is KEEP
    assert queue.ready(3)[:2] == ("NoCapacity", "True")
    assert queue.feeders(free=2)[2] is RUN, "its turn has come: the feeder says it again"


def test_jobs_that_are_not_fed_leave_no_shards_in_redis(make: Any) -> None:
    queue = Queue(make, 4).checked(1, 3, 4, streamed=34)
    suspended = make.job("job-4", number=4, suspend=True)
    decisions = queue.at(4, job=suspended).decide()
    assert decisions[0].actions == ()
    assert decisions[2].actions == (ClearStreams("j-3"),)
    assert (decisions[3].feeder, decisions[3].actions) == (SUSPEND, (ClearStreams("j-4"),))


def test_with_finetuning_off_data_are_checked_and_not_fed(make: Any) -> None:
    queue = Queue(make, 3)
    for number in (1, 2, 3):
        queue.at(number, endpoint=make.endpoint(finetuning={"policy": "Disabled"}))
    assert queue.feeders() == [CHECK, CHECK, KEEP]


@pytest.fixture
def kube() -> FakeKube:
    return FakeKube(Cache())


async def test_the_cluster_has_a_bound_on_checks(make: Any, kube: FakeKube) -> None:
    """Also where several begin at once, before a watch tells of any of them."""
    applier = FeederApplier(Settings(checks=3), kube, FakeStore(make), kube.cache)  # type: ignore[arg-type]
    decision = Decision("Pending", "WaitingForData", feeder=CHECK)  # type: ignore[arg-type]
    observed = [
        ObservedJob(make.job(f"job-{n}", number=n), make.endpoint(), Claims(), None, None, "inputs")
        for n in range(1, 8)
    ]
    create = kube.create

    async def slowly(body: dict[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(0)
        return await create(body)

    kube.create = slowly  # type: ignore[method-assign]
    answers = await asyncio.gather(*(applier.act(one, decision, None) for one in observed))
    made = [name for kind, name in kube.objects if kind == "Job"]
    assert made == ["job-1-feeder", "job-2-feeder", "job-3-feeder"]
    assert [answer is not None for answer in answers] == [False] * 3 + [True] * 4
    kube.drop("Job", "job-1-feeder")
    assert await applier.act(observed[6], decision, None) is None
    assert await applier.act(observed[5], decision, None) is not None


def test_a_check_is_told_to_a_program_that_reads_the_same(make: Any) -> None:
    fed, checked = (
        feeder(make.job(), make.endpoint(), "agent:1", RedisAccess("redis://r", "u", "p"), check)
        for check in (False, True)
    )
    env, more = (each["spec"]["template"]["spec"]["containers"][0]["env"] for each in (fed, checked))
    assert [one for one in more if one not in env] == [{"name": "COSERVE_MODE", "value": "Check"}]
    annotations = checked["metadata"]["annotations"]
    assert annotations == fed["metadata"]["annotations"] | {"coserve.dev/purpose": "Check"}


# ---- the operator as a process ----


@pytest.mark.apiserver
async def test_a_queue_of_jobs_is_checked_and_holds_nothing_more(served: Any, cluster: Cluster, make: Any) -> None:
    served.agent("p1")
    names = [f"job-{number}" for number in range(1, 6)]
    for number, name in enumerate(names, 1):
        cluster.apply(make.job_body(name, number=number))
        await eventually(lambda name=name: cluster.status("ftj", name))

    def feeders() -> dict[str, bool]:
        found = json.loads(cluster.kubectl("get", "jobs", "-o", "json"))["items"]
        return {
            each["metadata"]["name"].removesuffix("-feeder"): "coserve.dev/purpose" in each["metadata"]["annotations"]
            for each in found
        }

    def data(name: str) -> tuple[str, str]:
        return cluster.condition("ftj", name, "DataReady")["status"], cluster.status("ftj", name)["reason"]

    await eventually(lambda: sum(feeders().values()) == 2)
    order = sorted(names, key=lambda name: (cluster.get("ftj", name)["metadata"]["creationTimestamp"], name))
    assert order == names
    assert set(feeders()) == {*names[:4]}
    for name in names:
        await feed(served, cluster, name)  # a check that has said its word is taken away, and the next begins
    await eventually(lambda: feeders() == {"job-1": False, "job-2": False, "job-3": False})
    await eventually(lambda: [data(name) for name in names[1:]] == [("True", "NoCapacity")] * 4)
    await bound(cluster, "job-1", 1)

    late = str(cluster.get("ftj", "job-5")["metadata"]["uid"])
    shard = Shard(1, 0, SHA, (Sample(1, (1, 2), (0.0, 1.0)),))
    await served.store.push_shard(late, shard)  # of a feeder that was just taken away
    cluster.kubectl("patch", "ftj", "job-2", "--type=merge", "-p", '{"spec": {"suspend": true}}')
    await eventually(lambda: set(feeders()) == {"job-1", "job-2", "job-3", "job-4"})
    assert cluster.get("job", "job-2-feeder")["spec"]["suspend"] is True

    async def left() -> bool:
        return [await command(served.store.redis, "XLEN", served.keys.shards(late))] == [0]

    await eventually(left)
