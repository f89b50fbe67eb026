"""Jobs that are killed, stopped, fenced off and corrupted, and always come to the same adapter in the end."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import httpx

from coserve_api.job import PublishPolicy
from coserve_contract.connect import command
from coserve_contract.messages import Completed, Desired, Released


async def test_a_killed_agents_job_goes_on_elsewhere_with_nothing_lost_or_doubled(cluster: Any) -> None:
    first, second = await cluster.agents()
    material = cluster.feed(cluster.a)
    await cluster.bind(cluster.a, second)
    undisturbed = await cluster.result(cluster.a)
    assert isinstance(undisturbed, Completed), undisturbed
    expected = cluster.check_adapter(undisturbed, material)
    await cluster.feed_some(cluster.b, 12)
    await cluster.bind(cluster.b, first, adapter_name="killed")
    await cluster.step_reached(cluster.b, 12)
    cluster.feed(cluster.b)
    await asyncio.sleep(0.3)  # somewhere in the middle of what follows
    first.kill()
    record = await cluster.record(cluster.b)
    assert record.result is None
    assert record.checkpoint is not None
    await cluster.bind(cluster.b, second, resume=record.checkpoint, adapter_name="killed")
    result = await cluster.result(cluster.b)
    assert isinstance(result, Completed), result
    assert result.epoch == 2
    assert cluster.check_adapter(result, material) == expected
    assert (result.loss, result.eval_loss, result.tokens) == (
        undisturbed.loss,
        undisturbed.eval_loss,
        undisturbed.tokens,
    )
    assert f"from step {record.checkpoint.step} of 24" in second.log


async def test_a_stopped_job_is_given_back_and_goes_on(cluster: Any) -> None:
    agent = await cluster.agent()
    material = await cluster.feed_some(cluster.a, 7)
    binding = await cluster.bind(cluster.a, agent)
    await cluster.step_reached(cluster.a, 7)
    assert (
        await cluster.binder.rebrief(cluster.a, agent.id, binding.model_copy(update={"desired": Desired.STOP})) is None
    )
    released = await cluster.result(cluster.a)
    assert isinstance(released, Released), released
    record = await cluster.record(cluster.a)
    assert record.checkpoint is not None
    assert record.checkpoint.step == released.step == 7
    assert record.owner is None
    await asyncio.sleep(1.5)
    assert (await cluster.beat(agent)).jobs == {}
    cluster.feed(cluster.a)
    await cluster.bind(cluster.a, agent, resume=record.checkpoint)
    result = await cluster.result(cluster.a)
    assert isinstance(result, Completed), result
    cluster.check_adapter(result, material)


async def test_what_changes_of_a_binding_reaches_the_job_that_runs(cluster: Any) -> None:
    agent = await cluster.agent()
    await cluster.feed_some(cluster.a, 7)
    binding = await cluster.bind(cluster.a, agent, checkpoint_every_steps=20, publish=PublishPolicy.ALWAYS)

    async def under_way() -> bool:
        progress = (await cluster.record(cluster.a)).progress
        return progress is not None and progress.step == 7

    await cluster.until(under_way)
    changes = {"checkpoint_every_steps": 4, "checkpoint_keep": 3, "publish": PublishPolicy.NEVER, "priority": 2}
    changes |= {"max_slowdown_percent": 20}
    changed = binding.model_copy(update={"spec": binding.spec.model_copy(update=changes)})
    assert await cluster.binder.rebrief(cluster.a, agent.id, changed) is None

    async def taken_over() -> bool:
        return "goes on from step 7 with" in agent.log and "'max_slowdown_percent': 20" in agent.log

    await cluster.until(taken_over)
    cluster.feed(cluster.a)
    result = await cluster.result(cluster.a)
    assert isinstance(result, Completed), result
    assert (result.adapter, result.publish, result.step) == (None, PublishPolicy.NEVER, cluster.steps)
    folders = sorted(path.name for path in (cluster.artifacts / f"jobs/{cluster.a}/e1").iterdir())
    assert folders == ["s16", "s20", "s24"]


async def test_an_agent_told_to_end_gives_its_job_back_and_serves_meanwhile(cluster: Any, redis_server: Any) -> None:
    agent = await cluster.agent(drain_s=20)
    await cluster.feed_some(cluster.a, 7)
    await cluster.bind(cluster.a, agent)
    await cluster.step_reached(cluster.a, 7)
    body = {"model": "base", "prompt": "one", "max_tokens": 2, "ignore_eos": True}
    async with httpx.AsyncClient(base_url=await cluster.url(agent, "http")) as client:

        async def serves() -> None:
            answer = await client.post("/v1/completions", json=body)
            assert (answer.status_code, answer.headers["connection"]) == (200, "close")

        async def draining() -> bool:
            return "agent: draining" in agent.log

        redis_server.process.send_signal(signal.SIGSTOP)  # the job cannot be given back for now
        try:
            agent.process.send_signal(signal.SIGTERM)
            await cluster.until(draining)
            for _ in range(5):
                await serves()
        finally:
            redis_server.process.send_signal(signal.SIGCONT)
        assert isinstance(await cluster.result(cluster.a), Released)
        await serves()
    assert await asyncio.to_thread(agent.process.wait, 55) == 0
    record = await cluster.record(cluster.a)
    assert record.checkpoint is not None
    assert record.checkpoint.step == record.result.step == 7
    assert agent.id not in (await cluster.store.fleet()).agents


async def test_a_higher_epoch_elsewhere_ends_a_run_that_still_lives(cluster: Any) -> None:
    """The first agent is paused longer than its lease lasts, as by a broken node, and wakes up."""
    first, second = await cluster.agents()
    material = await cluster.feed_some(cluster.a, 7)
    await cluster.bind(cluster.a, first)
    await cluster.step_reached(cluster.a, 7)
    os.kill(first.process.pid, signal.SIGSTOP)
    try:
        record = await cluster.record(cluster.a)
        cluster.feed(cluster.a)
        await cluster.bind(cluster.a, second, resume=record.checkpoint)
        result = await cluster.result(cluster.a)
    finally:
        os.kill(first.process.pid, signal.SIGCONT)
    assert isinstance(result, Completed), result
    assert result.epoch == 2
    cluster.check_adapter(result, material)

    async def dropped() -> bool:
        return (await cluster.beat(first)).jobs == {} if first.id in (await cluster.store.fleet()).agents else False

    await cluster.until(dropped)
    assert (await cluster.record(cluster.a)).result == result
    assert "nothing more is written" in first.log or "its binding is gone" in first.log


async def test_a_corrupt_checkpoint_falls_back_to_the_one_before(cluster: Any) -> None:
    first, second = await cluster.agents()
    material = await cluster.feed_some(cluster.a, 11)
    await cluster.bind(cluster.a, first)
    await cluster.step_reached(cluster.a, 11)
    first.kill()
    cluster.feed(cluster.a)
    record = await cluster.record(cluster.a)
    assert record.checkpoint is not None
    corrupt = cluster.artifacts / record.checkpoint.path / "optimizer.safetensors"
    corrupt.write_bytes(corrupt.read_bytes()[:-1] + b"\x55")
    await cluster.bind(cluster.a, second)
    result = await cluster.result(cluster.a)
    assert isinstance(result, Completed), result
    cluster.check_adapter(result, material)
    assert "going on from the older checkpoint of step" in second.log
    progress = (await cluster.record(cluster.a)).progress
    assert progress is not None
    assert "cannot be used" in progress.rewound
    assert "optimizer.safetensors" in progress.rewound


async def test_a_job_whose_artifact_store_is_away_is_given_back_and_goes_on_later(cluster: Any) -> None:
    """A file stands where its folder was: nothing below it can be opened or made."""
    agent = await cluster.agent()
    material = cluster.feed(cluster.b)
    await cluster.bind(cluster.b, agent, adapter_name="undisturbed")
    expected = cluster.check_adapter(await cluster.result(cluster.b), material)
    await cluster.feed_some(cluster.a, 7)
    await cluster.bind(cluster.a, agent)
    await cluster.step_reached(cluster.a, 7)
    away = cluster.artifacts.with_name("away")
    cluster.artifacts.rename(away)
    try:
        cluster.artifacts.touch()
        cluster.feed(cluster.a)
        released = await cluster.result(cluster.a)
    finally:
        cluster.artifacts.unlink()
        away.rename(cluster.artifacts)
    assert isinstance(released, Released), released
    assert (released.reason, released.step) == ("ArtifactStoreError", 5)
    assert agent.log.count("tries again in") == 2
    record = await cluster.record(cluster.a)
    assert record.checkpoint is not None
    await cluster.bind(cluster.a, agent, resume=record.checkpoint)
    assert cluster.check_adapter(await cluster.result(cluster.a), material) == expected


async def test_a_job_without_a_whole_checkpoint_is_given_back_and_says_so(cluster: Any) -> None:
    first, second = await cluster.agents()
    await cluster.feed_some(cluster.a, 6)
    await cluster.bind(cluster.a, first)
    await cluster.step_reached(cluster.a, 6)
    first.kill()
    for manifest in cluster.artifacts.glob(f"jobs/{cluster.a}/*/*/manifest.json"):
        manifest.unlink()
    await cluster.bind(cluster.a, second)
    result = await cluster.result(cluster.a)
    assert isinstance(result, Released), result
    assert result.reason == "ArtifactStoreError"
    assert "manifest.json" in result.message


async def test_an_agent_that_computes_otherwise_gives_the_job_back_at_once(cluster: Any) -> None:
    """Another try would end alike, and an older checkpoint, too."""
    first = await cluster.agent()
    await cluster.feed_some(cluster.a, 6)
    await cluster.bind(cluster.a, first)
    await cluster.step_reached(cluster.a, 6)
    first.kill()
    second = await cluster.agent(dtype="bfloat16")
    await cluster.bind(cluster.a, second)
    result = await cluster.result(cluster.a)
    assert isinstance(result, Released), result
    assert result.reason == "EndpointRejected"
    assert "dtype is float32, and this engine's is bfloat16" in result.message
    assert "set engine.dtype of the endpoint to float32" in result.message
    assert "tries again" not in second.log


async def test_an_emptied_redis_costs_nothing(cluster: Any) -> None:
    agent = await cluster.agent()
    material = await cluster.feed_some(cluster.a, 7)
    binding = await cluster.bind(cluster.a, agent)
    record = await cluster.step_reached(cluster.a, 7)
    await command(cluster.store.redis, "FLUSHALL")
    await asyncio.sleep(2)
    cluster.feed(cluster.a)
    resume = binding.model_copy(update={"resume": record.checkpoint})
    assert await cluster.binder.bind(cluster.a, agent.id, resume) is None
    await cluster.store.set_incarnation("two")
    result = await cluster.result(cluster.a)
    assert isinstance(result, Completed), result
    assert result.epoch == 1
    cluster.check_adapter(result, material)


async def test_an_unbound_job_is_dropped(cluster: Any) -> None:
    agent = await cluster.agent()
    await cluster.feed_some(cluster.a, 7)
    await cluster.bind(cluster.a, agent)
    await cluster.step_reached(cluster.a, 7)
    await cluster.store.delete_job(cluster.a)

    async def dropped() -> bool:
        return (await cluster.beat(agent)).jobs == {}

    await cluster.until(dropped)
    record = await cluster.record(cluster.a)
    assert record.progress is None
    assert record.checkpoint is None


async def test_a_job_that_is_bound_again_and_again_loses_and_doubles_nothing(cluster: Any) -> None:
    """Each binding takes the job from an agent in the middle of a step, a checkpoint, or an evaluation."""
    agents = await cluster.agents()
    await cluster.feed_some(cluster.a, cluster.steps - 1)
    for turn in range(6):
        await cluster.bind(cluster.a, agents[turn % 2], checkpoint_every_steps=2)
        await asyncio.sleep(0.55 + 0.07 * turn)
    material = cluster.feed(cluster.a)
    result = await cluster.result(cluster.a)
    assert isinstance(result, Completed), result
    cluster.check_adapter(result, material)
