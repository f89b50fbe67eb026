"""spec.adapters on a real API server and a real Redis: what agents are told to serve follows it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from live_operator import SHA, Cluster, bound, eventually, feed

from coserve_contract.messages import AdapterFailure, AdapterFiles, Completed

pytestmark = pytest.mark.apiserver


async def test_publish_pin_hide_and_return_to_the_newest(served: Any, cluster: Cluster, make: Any) -> None:
    agent = served.agent("p1")

    async def train(name: str, number: int) -> None:
        cluster.apply(make.job_body(name), adapter={"name": "bot"})
        uid = await feed(served, cluster, name)
        await bound(cluster, name, 1)
        binding = await eventually(lambda: agent.binding(uid))
        assert binding.spec.adapter_number == number
        await agent.run(uid, 1)
        files = AdapterFiles(name="bot", number=number, path=f"adapters/e-1/bot/v{number}", sha256=SHA)
        assert await agent.fencing.finish(uid, Completed(epoch=1, step=10, adapter=files)) is None
        agent.jobs.clear()
        await eventually(lambda: cluster.condition("ftj", name, "Complete")["status"] == "True")

    async def told(**numbers: int) -> None:
        async def same() -> bool:
            return {name: each.number for name, each in (await served.store.adapters()).items()} == numbers

        await eventually(same)

    def override(*entries: dict[str, Any]) -> None:
        patch = json.dumps({"spec": {"adapters": list(entries)}})
        cluster.kubectl("patch", "iep", "tiny", "--type=merge", "-p", patch)

    await train("one", 1)
    await train("two", 2)
    await told(bot=2)
    override({"name": "bot", "version": 1})
    await told(bot=1)
    await train("three", 3)
    await told(bot=1)
    assert cluster.condition("ftj", "three", "Published")["reason"] == "Stored"
    assert "Stored" in cluster.events("three")
    for name in ("one", "two", "three"):
        cluster.kubectl("delete", "ftj", name)
    override({"name": "bot", "state": "Absent"})
    await told()
    override({"name": "bot", "version": 2})
    await told(bot=2)
    override()
    await told(bot=3)
    await eventually(lambda: cluster.condition("iep", "tiny", "AdaptersReady")["reason"] == "AllLoaded")
    agent.more = {"failed_adapters": (AdapterFailure(name="bot", number=3, reason="the file is corrupt"),)}
    agent.follows = False
    agent.adapters = {}
    found = await eventually(
        lambda: (c := cluster.condition("iep", "tiny", "AdaptersReady"))["reason"] == "LoadFailed" and c
    )
    assert "the file is corrupt" in found["message"]
