"""The keys of an endpoint share a slot: everything works against Redis Cluster, which refuses commands across slots."""

from __future__ import annotations

import asyncio
import shutil

import pytest
from redis.exceptions import ResponseError

from coserve_contract.connect import command, connect
from coserve_contract.messages import Completed
from coserve_contract.scripts import Lease
from coserve_contract.store import Push

JOB = "job-1"


@pytest.fixture
async def cluster_node(tmp_path, servers):
    """A client of a one-node cluster that has all slots."""
    port, log = servers.free_port(), tmp_path / "log"
    bus = servers.free_port()
    words = [
        shutil.which("redis-server"),
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--protected-mode",
        "yes",
    ]
    words += [
        "--cluster-enabled",
        "yes",
        "--cluster-port",
        str(bus),
        "--cluster-config-file",
        str(tmp_path / "nodes.conf"),
    ]
    with servers.program(words, log) as process:
        servers.wait_until(lambda: servers.answers(port), process, log)
        client = connect(f"redis://127.0.0.1:{port}/0")
        await command(client, "CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        while b"cluster_state:ok" not in await command(client, "CLUSTER", "INFO"):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        yield client
        await client.aclose()


async def test_a_jobs_whole_life_stays_in_one_slot(cluster_node, make_world, messages) -> None:
    with pytest.raises(ResponseError, match="same slot"):
        await command(cluster_node, "MGET", "cs:{one}:x", "cs:{two}:x")
    world = make_world(cluster_node)
    await world.start()
    assert await world.binder.bind(JOB, world.a.agent, messages.binding(1)) is None
    assert await world.binder.bind(JOB, world.b.agent, messages.binding(2)) is None
    assert isinstance(await world.b.take_lease(JOB, 2), Lease)
    assert (await world.store.push_shard(JOB, messages.shard(1))).outcome is Push.ADDED
    assert (await world.store.push_eval(JOB, messages.shard(1))).outcome is Push.ADDED
    assert await world.b.report_progress(JOB, messages.progress(2, 1)) is None
    assert await world.b.accept_checkpoint(JOB, 2, messages.checkpoint(1, 2)) is None
    assert await world.b.rewind(JOB, 2, None) is None
    assert await world.binder.rebrief(JOB, world.b.agent, messages.binding(2)) is None
    assert await world.b.finish(JOB, Completed(epoch=2, step=1)) is None
    assert await world.binder.unbind(JOB, world.b.agent, 2) is None
    assert (await world.store.job(JOB)).result == Completed(epoch=2, step=1)
    assert len((await world.store.fleet()).agents) == 2
    assert await world.binder.sweep_agents() == ()
    await world.store.delete_endpoint()
    assert await command(cluster_node, "DBSIZE") == 0
