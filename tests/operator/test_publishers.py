"""To whom an adapter's name belongs: who published under it first, until the endpoint's owner says otherwise; and that
an API server holds what a job says of its creator to the truth.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from job_situation import Situation

from coserve_api.adapters import PUBLISHER
from coserve_api.job import FinetuneJob
from coserve_operator.decide import endpoint_status
from coserve_operator.decide.claims import claims
from coserve_operator.decide.observed import RedisView
from coserve_operator.decide.published import owners, publication, published

ROOT = Path(__file__).parents[2]
SHA = "a" * 64


class World:
    """One endpoint, whose jobs have published."""

    def __init__(self, make: Any) -> None:
        self.make, self.status, self.spec = make, {}, {}

    def job(self, publisher: str, version: int | None = None, **spec: Any) -> FinetuneJob:
        body = self.make.job_body(f"job-{version}", number=version or 50, adapter={"name": "bot"}, **spec)
        if publisher:
            body["metadata"]["annotations"] = {PUBLISHER: publisher}
        if version is not None:
            uri = f"pvc://artifacts/store/adapters/e-1/bot/v{version}"
            adapter = {"name": "bot", "version": version, "uri": uri, "sha256": SHA}
            body["status"] = {"adapter": adapter, "completionTime": "2026-11-21T12:00:00Z"}
        return FinetuneJob.from_dict(body)

    def see(self, *jobs: FinetuneJob) -> dict[str, str]:
        """A pass: the names' owners, which go into the status."""
        endpoint = self.make.endpoint(status=self.status, **self.spec)
        by_jobs = [publication(job, job.status.adapter) for job in jobs]
        found = owners(endpoint, by_jobs)
        known = published(endpoint, by_jobs, {})
        view = RedisView("i", {})
        observed = endpoint_status.ObservedEndpoint(endpoint, redis=view, published=known, owners=found)
        self.status = endpoint_status.status_of(observed, self.make.NOW).to_dict()
        return found

    def waits(self, job: FinetuneJob) -> tuple[str, str]:
        situation = Situation(self.make)
        situation.endpoint = self.make.endpoint(status=self.status, **self.spec)
        situation.body = json.loads(job.model_dump_json(by_alias=True, exclude_none=True))
        situation.owners = owners(situation.endpoint, [])
        decision = situation.judge()
        return str(decision.reason), decision.message


@pytest.fixture
def world(make: Any) -> World:
    made = World(make)
    made.see(made.job("alice", 1), made.job("bob", 2))
    return made


def test_a_name_belongs_to_who_published_first_also_when_that_job_is_gone(world: World) -> None:
    assert world.see() == {"bot": "alice"}
    assert world.see(world.job("bob", 3)) == {"bot": "alice"}
    assert world.waits(world.job("alice"))[0] != "NameTaken"
    for other in ("bob", ""):
        reason, message = world.waits(world.job(other))
        assert reason == "NameTaken"
        assert all(word in message for word in ("bot", "'alice'", "spec.adapters", other or PUBLISHER))


def test_what_publishes_nothing_takes_no_name(world: World) -> None:
    assert world.waits(world.job("bob", publish={"policy": "Never"}))[0] != "NameTaken"


def test_the_endpoints_owner_gives_a_name_away_for_good(world: World) -> None:
    world.spec = {"adapters": [{"name": "bot", "publisher": "bob"}]}
    assert world.see() == {"bot": "bob"}
    world.spec = {}
    assert world.see() == {"bot": "bob"}
    assert world.waits(world.job("alice"))[0] == "NameTaken"
    assert world.waits(world.job("bob"))[0] != "NameTaken"


def test_a_freed_name_is_everybodys_and_then_who_publishes_next_has_it(world: World) -> None:
    world.spec = {"adapters": [{"name": "bot", "publisher": ""}]}
    assert world.see(world.job("bob", 3)) == {}
    assert world.waits(world.job("carol"))[0] != "NameTaken"
    world.spec = {}
    assert world.see() == {}
    assert world.see(world.job("carol", 4)) == {"bot": "carol"}


def test_without_annotations_names_belong_to_nobody(make: Any) -> None:
    world = World(make)
    assert world.see(world.job("", 1)) == {}
    assert world.waits(world.job(""))[0] != "NameTaken"
    assert claims([], [], {}).owner_elsewhere(world.job("bob")) == ""


@pytest.mark.apiserver
def test_an_api_server_lets_nobody_say_to_be_another(api_server: Any, cluster_with_policy: None) -> None:
    def said(user: str, publisher: str | None, name: str = "j", verb: str = "create") -> str:
        body = json.loads(json.dumps(JOB))
        body["metadata"]["name"] = name
        if publisher is not None:
            body["metadata"]["annotations"] = {PUBLISHER: publisher}
        who = ("--as", user, "--as-group", "system:masters")
        done = api_server.kubectl(verb, "-f", "-", *who, stdin=json.dumps(body))
        return done.stderr if done.returncode else ""

    deadline = time.monotonic() + 60  # a new policy is not in force at once
    while not (refused := said("bob", "alice", "probe")):
        assert time.monotonic() < deadline
        api_server.kubectl("delete", "ftj", "probe", "--wait")
        time.sleep(0.5)
    assert all(word in refused for word in (PUBLISHER, "alice", "bob"))
    assert "bob" in said("bob", None)
    assert said("alice", "alice") == ""
    assert said("bob", "alice", verb="apply") == "", "others may change the rest of it, where they have the right"
    assert "stays" in said("bob", "bob", verb="apply")
    assert "stays" in said("alice", "bob", verb="replace")
    patch = ("patch", "ftj", "j", "--subresource=status", "--type=merge", "-p", '{"status": {"state": "Pending"}}')
    assert api_server.kubectl(*patch).returncode == 0, "statuses are the operator's"


JOB = {
    "apiVersion": "coserve.dev/v1alpha1",
    "kind": "FinetuneJob",
    "metadata": {"name": "j"},
    "spec": {
        "endpointRef": {"name": "tiny"},
        "dataset": {"uri": "pvc://data/train.jsonl"},
        "adapter": {"name": "bot"},
        "training": {"epochs": 1},
    },
}


@pytest.fixture
def cluster_with_policy(api_server: Any, render: Any) -> Any:
    crd = ROOT / "crds" / "finetunejobs.yaml"
    assert api_server.kubectl("apply", "--server-side", "-f", str(crd)).returncode == 0
    api_server.kubectl("wait", "--for=condition=Established", "crd/finetunejobs.coserve.dev", "--timeout=60s")
    policy = render({"admission": {"publishers": True}}, "-s", "templates/admission.yaml").stdout
    applied = api_server.kubectl("apply", "-f", "-", stdin=policy)
    assert applied.returncode == 0, applied.stderr
    yield
    api_server.kubectl("delete", "-f", "-", stdin=policy)
    api_server.kubectl("delete", "ftj", "--all")
