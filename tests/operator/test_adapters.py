"""Which versions of its adapters an endpoint serves, and what its status and its jobs' say of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from coserve_api.adapters import MAX_ADAPTERS, MAX_OLDER
from coserve_contract.messages import AdapterFailure, AdapterRecord
from coserve_contract.store import JobRecord
from coserve_operator.decide import endpoint_status, job_status
from coserve_operator.decide.observed import RedisView
from coserve_operator.decide.published import greatest_rank, last_numbers, published, served, trained_rank
from coserve_operator.manifests import agents
from coserve_operator.tenants import RedisAccess

SHA = "0123456789abcdef" * 4


def record(name: str = "bot", number: int = 1, rank: int = 8) -> AdapterRecord:
    path = f"adapters/e-1/{name}/v{number}"
    return AdapterRecord(name=name, number=number, path=path, sha256=SHA, job_uid="j", rank=rank)


class World:
    """One endpoint pass after pass: `serve` writes what is known into its status, as a pass does."""

    def __init__(self, make: Any) -> None:
        self.make, self.spec, self.status = make, {}, {}
        self.beats: list[Any] = []

    @property
    def endpoint(self) -> Any:
        return self.make.endpoint(status=self.status, **self.spec)

    def publish(self, *records: AdapterRecord) -> dict[str, int]:
        endpoint = self.endpoint
        known = published(endpoint, [], {each.name: each for each in records})
        chosen = served(endpoint, known)
        view = RedisView("i", {beat.agent_id: beat for beat in self.beats})
        observed = endpoint_status.ObservedEndpoint(
            endpoint, redis=view, published=known, adapters=chosen, ready_replicas=len(self.beats)
        )
        self.status = endpoint_status.status_of(observed, self.make.NOW).to_dict()
        return {name: each.number for name, each in chosen.items()}

    def override(self, **entry: Any) -> None:
        self.spec = {"adapters": [entry]}

    def condition(self) -> tuple[str, str, str]:
        found = next(each for each in self.status["conditions"] if each["type"] == "AdaptersReady")
        return found["status"], found["reason"], found["message"]

    def adapter(self) -> dict[str, Any]:
        return self.status["adapters"][0]


@pytest.fixture
def world(make: Any) -> World:
    made = World(make)
    for number in (1, 2, 3):
        assert made.publish(record(number=number)) == {"bot": number}
    return made


def test_a_name_that_is_not_listed_is_the_newest_version_and_the_older_ones_stay_known(world: World) -> None:
    assert world.publish() == {"bot": 3}
    kept = world.adapter()
    assert (kept["version"], kept["servedVersion"]) == (3, 3)
    assert [(each["version"], each["sha256"], each["jobUid"]) for each in kept["older"]] == [
        (2, SHA, "j"),
        (1, SHA, "j"),
    ]
    assert kept["older"][0]["uri"] == "pvc://artifacts/store/adapters/e-1/bot/v2"


def test_a_pin_rolls_back_and_outlasts_what_is_published_later(world: World) -> None:
    world.override(name="bot", version=1)
    assert world.publish() == {"bot": 1}
    assert world.publish(record(number=4)) == {"bot": 1}
    assert (world.adapter()["version"], world.adapter()["servedVersion"]) == (4, 1)
    assert "bot stays at version 1, 4 is published" in world.condition()[2]
    world.spec = {}
    assert world.publish() == {"bot": 4}


def test_absent_hides_every_version_and_taking_the_entry_out_returns_to_the_newest(world: World) -> None:
    world.override(name="bot", state="Absent")
    assert world.publish() == {}
    assert world.publish(record(number=4)) == {}
    assert (world.adapter()["version"], world.adapter().get("servedVersion")) == (4, None)
    assert "hides bot" in world.condition()[2]
    world.override(name="bot", state="Absent", version=2)
    assert world.publish() == {}
    world.spec = {}
    assert world.publish() == {"bot": 4}


def test_a_pin_on_a_version_that_nobody_published_leaves_what_is_served_and_says_so(world: World) -> None:
    world.override(name="bot", version=2)
    world.publish()
    world.override(name="bot", version=7)
    assert world.publish() == {"bot": 2}
    status, reason, message = world.condition()
    assert (status, reason) == ("False", "VersionNotFound")
    assert "version 7, and known are 3, 2, 1" in message
    assert world.publish(record(number=7)) == {"bot": 7}


def test_a_pin_before_anything_is_published_waits_for_its_version(make: Any) -> None:
    world = World(make)
    world.override(name="bot", version=2)
    assert world.publish() == {}
    assert "none of that name is published" in world.condition()[2]
    assert world.publish(record(number=1)) == {}
    assert world.publish(record(number=2)) == {"bot": 2}


def test_the_versions_that_are_kept_are_few_and_the_served_one_is_among_them(world: World) -> None:
    world.override(name="bot", version=1)
    for number in range(4, 30):
        world.publish(record(number=number))
    kept = [each["version"] for each in world.adapter()["older"]]
    assert kept == [28, 27, 26, 1]
    assert len(kept) == MAX_OLDER
    world.spec = {}
    world.publish(record(number=30))
    assert [each["version"] for each in world.adapter()["older"]] == [29, 28, 27, 26]
    assert last_numbers(world.endpoint, published(world.endpoint, [], {})) == {"bot": 30}


def test_an_operator_without_overrides_goes_on_with_the_newest(world: World) -> None:
    """What it reads of status is the newest version, so that it never gives a number twice."""
    world.override(name="bot", version=1)
    world.publish()
    assert (world.adapter()["version"], world.adapter()["uri"][-2:]) == (3, "v3")


def test_redis_never_adds_more_names_than_a_status_takes(make: Any) -> None:
    many = {f"a{number}": record(f"a{number}") for number in range(MAX_ADAPTERS + 1)}
    known = published(make.endpoint(), [], many)
    assert len(known) == MAX_ADAPTERS


def test_the_largest_status_is_written_and_fits_into_etcd(make: Any) -> None:
    world = World(make)
    names = ["n" * 60 + str(number) for number in range(100, 100 + MAX_ADAPTERS)]
    for number in range(1, MAX_OLDER + 2):
        world.publish(*[record(name, 10**9 + number) for name in names])
    assert len(world.status["adapters"]) == MAX_ADAPTERS
    assert len(json.dumps(world.status)) < 1_400_000


# ---- what agents say ----


def test_ready_agents_are_those_with_the_version_that_is_served(world: World, make: Any) -> None:
    world.beats = [make.heartbeat("p1", adapters={"bot": 3}), make.heartbeat("p2", adapters={"bot": 2})]
    world.publish()
    assert world.adapter()["readyAgents"] == 1
    assert world.condition()[:2] == ("False", "Loading")
    world.override(name="bot", version=2)
    world.publish()
    assert world.adapter()["readyAgents"] == 1
    world.beats = [make.heartbeat("p1", adapters={"bot": 2}), make.heartbeat("p2", adapters={"bot": 2})]
    world.publish()
    assert world.condition()[:2] == ("True", "AllLoaded")


def test_an_adapter_that_does_not_load_is_a_condition_with_the_agents_words(world: World, make: Any) -> None:
    failed = (AdapterFailure(name="bot", number=3, tries=2, reason="v3: its checksum differs"),)
    world.beats = [make.heartbeat("p1", adapters={"bot": 3}), make.heartbeat("p2", failed_adapters=failed)]
    world.publish()
    status, reason, message = world.condition()
    assert (status, reason) == ("False", "LoadFailed")
    assert "bot version 3 does not load on 1 of 2 ready agents: v3: its checksum differs" in message
    world.beats = world.beats[:1]
    world.publish()
    assert world.condition()[:2] == ("True", "AllLoaded")
    world.beats = [make.heartbeat("p2", failed_adapters=failed, adapters={"bot": 2})]
    world.override(name="bot", version=2)
    world.publish()
    assert world.condition()[:2] == ("True", "AllLoaded"), "what is not to be served need not load"


def test_agents_keep_room_for_the_greatest_rank_that_was_published(world: World, make: Any) -> None:
    def told(endpoint: Any) -> str:
        known = published(endpoint, [], {})
        access = RedisAccess("redis://r:1/0", "u", "p")
        made = agents.deployment(endpoint, 1, "image", access, least_rank=greatest_rank(known))
        env = made["spec"]["template"]["spec"]["containers"][0]["env"]
        return str(next(each["value"] for each in env if each["name"] == "COSERVE_MAX_RANK"))

    world.publish(record("wide", rank=64))
    world.beats = [make.heartbeat("p1", adapters={"bot": 3, "wide": 1})]
    assert told(world.endpoint) == "64"
    world.spec = {"finetuning": {"maxRank": 16}}
    world.publish()
    assert told(world.endpoint) == "64", "else agents could not load it"
    status, reason, message = world.condition()
    assert (status, reason) == ("True", "RankAboveMaxRank")
    assert "wide was published with a rank up to 64, and spec.finetuning.maxRank is 16" in message
    world.spec = {"finetuning": {"maxRank": 128}}
    assert told(world.endpoint) == "128"


def test_agents_keep_room_for_a_job_that_has_begun(make: Any) -> None:
    def job(number: int, rank: int, **status: Any) -> Any:
        return make.job(f"job-{number}", number=number, adapter={"name": "a", "rank": rank}, status=status)

    begun = {"startTime": "2026-11-21T11:40:00Z"}
    assert trained_rank([job(1, 64)]) == 0
    assert trained_rank([job(1, 64), job(2, 32, **begun)]) == 32
    assert trained_rank([job(2, 32, **begun, completionTime="2026-11-21T11:50:00Z")]) == 0


# ---- what jobs say ----


@pytest.mark.parametrize(
    ("override", "words"),
    [({"version": 3}, "pins version 3"), ({"state": "Absent"}, "hides the name (state Absent)")],
)
def test_a_job_under_a_pinned_or_absent_name_is_stored_and_says_so(it, make, override, words) -> None:
    it.bound()
    it.record = JobRecord(result=make.completed("adapter-1", 1, number=4))
    it.agents = {}
    it.endpoint = make.endpoint(adapters=[{"name": "adapter-1"} | override])
    before, decision = it.see(), it.judge()
    assert (decision.state, decision.published[:2]) == ("Complete", (False, "Stored"))
    assert words in decision.published[2]
    assert decision.adapter.version == 4
    told = [(one.reason, one.warning) for one in job_status.events(before, decision, it.write(decision))]
    assert ("Stored", True) in told


def test_a_pin_on_the_very_version_is_published_as_ever(it, make) -> None:
    it.bound()
    it.record = JobRecord(result=make.completed("adapter-1", 1, number=4))
    it.endpoint = make.endpoint(adapters=[{"name": "adapter-1", "version": 4}, {"name": "other", "state": "Absent"}])
    it.agents = {}
    assert it.judge().reason == "Publishing"
    it.agents = {"uid-p1.b1": make.heartbeat("p1", adapters={"adapter-1": 4})}
    assert it.judge().published[:2] == (True, "Published")


def test_a_job_whose_adapter_no_agent_can_load_ends_and_says_so(it, make) -> None:
    it.bound()
    it.record = JobRecord(result=make.completed("adapter-1", 1))

    def failed(tries: int) -> tuple[AdapterFailure, ...]:
        return (AdapterFailure(name="adapter-1", number=1, tries=tries, reason="the file is corrupt"),)

    it.agents = {
        "uid-p1.b1": make.heartbeat("p1", failed_adapters=failed(3)),
        "uid-p2.b1": make.heartbeat("p2", failed_adapters=failed(2)),
    }
    decision = it.judge()
    assert (decision.reason, decision.published[:2]) == ("Publishing", (False, "Publishing"))
    assert "0 of 2 ready agents serve it; 2 cannot load it: the file is corrupt" in decision.message
    it.agents["uid-p2.b1"] = make.heartbeat("p2", adapters={"adapter-1": 1})
    decision = it.judge()
    assert (decision.state, decision.published[:2]) == ("Complete", (False, "LoadFailed"))
    assert "1 of 2 ready agents serve it" in decision.published[2]


def test_a_name_beyond_the_most_waits_with_a_reason(it, make) -> None:
    it.published = {f"n{number}": record(f"n{number}") for number in range(MAX_ADAPTERS)}
    decision = it.judge()
    assert (decision.state, decision.reason) == ("Pending", "TooManyAdapters")
    assert "has 512 adapters" in decision.message
    it.body["spec"]["adapter"]["name"] = "n7"
    assert it.judge().reason != "TooManyAdapters"
    it.body["spec"]["adapter"]["name"] = "new"
    it.published.popitem()
    assert it.judge().reason != "TooManyAdapters"
    it.rivals = (make.job("other", number=2, adapter={"name": "more"}),)
    assert it.judge().reason != "TooManyAdapters", "the other is younger"
    it.rivals = (make.job("other", number=2, adapter={"name": "more"}, status={"startTime": "2026-11-21T11:40:00Z"}),)
    assert it.judge().reason == "TooManyAdapters", "the other has begun, and will publish"
    it.body["spec"]["publish"] = {"policy": "Never"}
    assert it.judge().reason != "TooManyAdapters"
