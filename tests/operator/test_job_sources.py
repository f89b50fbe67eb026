"""A job that goes on from an adapter: which folder is meant, who can read it, and what an agent is told of it."""

from __future__ import annotations

from typing import Any

import pytest

from coserve_contract.messages import AdapterRecord, BindingSpec
from coserve_contract.store import JobRecord
from coserve_operator.decide import job as jobs
from coserve_operator.decide.published import publication, published

SHA = "0123456789abcdef" * 4


def record(number: int, name: str = "before") -> AdapterRecord:
    path = f"adapters/e-1/{name}/v{number}"
    return AdapterRecord(name=name, number=number, path=path, sha256=SHA, job_uid="j-9", rank=4)


def told(it: Any, make: Any) -> BindingSpec:
    """The binding that the job gets from an agent with room; its status is written."""
    it.agents[make.agent_of("p1")] = make.heartbeat("p1")
    decision = jobs.assign(it.see(), it.judge(), it.agents, make.agent_of("p1"), 0)
    (action,) = decision.actions
    it.write(decision)
    spec: BindingSpec = action.binding.spec
    return spec


def test_without_a_source_a_job_has_the_default_shape(it, make) -> None:
    spec = told(it, make)
    assert (spec.rank, spec.alpha, len(spec.target_modules), spec.start) == (8, 16, 7, None)


def test_a_published_name_is_its_newest_version_and_the_shape_is_taken_over(it, make) -> None:
    it.body["spec"]["adapter"] = {"name": "after", "from": "before"}
    it.published = {"before": record(3)}
    spec = told(it, make)
    assert (spec.rank, spec.alpha, spec.target_modules) == (None, None, None)
    assert spec.start.model_dump(exclude_none=True) == {"path": "adapters/e-1/before/v3", "sha256": SHA}
    assert it.body["status"]["continuedFrom"] == {
        "uri": "pvc://artifacts/store/adapters/e-1/before/v3", "version": 3, "sha256": SHA,
    }  # fmt: skip


def test_what_the_first_binding_chose_stays(it, make) -> None:
    """Though a newer version is published, or none is left."""
    it.body["spec"]["adapter"] = {"name": "after", "from": "before"}
    it.published = {"before": record(3)}
    first = told(it, make)
    for it.published in ({"before": record(4)}, {}):
        it.record = JobRecord(feed=make.feed())
        assert told(it, make).start == first.start


def test_a_name_that_is_not_published_is_waited_for_by_name(it, make) -> None:
    it.body["spec"]["adapter"] = {"name": "after", "from": "before"}
    decision = it.judge()
    assert (decision.state, decision.reason, decision.wants_agent) == ("Pending", "AdapterNotFound", False)
    assert "spec.adapter.from is before" in decision.message
    it.published = {"before": record(1)}
    assert it.judge().wants_agent


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("pvc://artifacts/store/mine", "mine"),
        ("pvc://artifacts/store/a/b/", "a/b"),
        ("pvc://artifacts/elsewhere/b", "/artifacts/elsewhere/b"),
        ("pvc://artifacts/storehouse", "/artifacts/storehouse"),
        ("pvc://artifacts/", "/artifacts"),
        ("pvc://models/adapters/a", "/models/models/adapters/a"),
        ("file:///models/adapters/a", "/models/adapters/a"),
        ("file:///artifacts/a", "/artifacts/a"),
    ],
)
def test_a_folder_is_where_the_agents_see_it(it, make, source, path) -> None:
    it.body["spec"]["adapter"] = {
        "name": "after", "from": source, "rank": 4, "useRslora": "Disabled", "targetModules": ["q_proj"],
    }  # fmt: skip
    start = told(it, make).start
    assert (start.path, start.sha256) == (path, None)
    assert (start.rank, start.alpha, start.use_rslora, start.target_modules) == (4, None, False, ("q_proj",))


def test_a_folder_in_a_store_on_a_path_of_the_node(it, make) -> None:
    it.endpoint = make.endpoint(artifactStore={"uri": "file:///artifacts/team"})
    it.body["spec"]["adapter"] = {"name": "after", "from": "file:///artifacts/team/a"}
    assert told(it, make).start.path == "a"


def test_a_job_waits_for_a_claim_that_agents_do_not_have(it) -> None:
    it.body["spec"]["adapter"] = {"name": "after", "from": "pvc://data/adapter"}
    decision = it.judge()
    assert (decision.state, decision.reason) == ("Pending", "EndpointRejected")
    assert "spec.adapter.from is pvc://data/adapter" in decision.message
    assert "pvc://models and pvc://artifacts" in decision.message


def test_the_rank_that_was_taken_over_is_the_published_one(it, make) -> None:
    it.body["spec"]["adapter"] = {"name": "after", "from": "before"}
    it.published = {"before": record(3)}
    it.bound()
    it.record = JobRecord(
        fence=it.record.fence, feed=make.feed(), result=make.completed("after", 1).model_copy(update={"rank": 4})
    )
    status = it.write(it.judge())
    assert status.adapter.rank == 4
    found = published(it.endpoint, [publication(it.see().job, status.adapter)], {})
    assert found["after"][0].rank == 4
