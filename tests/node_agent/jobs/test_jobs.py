"""Jobs that run undisturbed, and the mistakes of users."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest

from coserve_api.job import PublishPolicy
from coserve_contract.messages import AdapterRecord, Completed, Failed, Released


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=30) as client:
        yield client


async def test_a_job_becomes_an_adapter_that_answers(cluster: Any) -> None:
    agent = await cluster.agent()
    material = await cluster.feed_some(cluster.a, 6)
    await cluster.bind(cluster.a, agent)
    record = await cluster.step_reached(cluster.a, 6)
    assert record.progress is not None
    assert (record.progress.total_steps, record.progress.cursor) == (cluster.steps, 6)
    assert record.progress.eval_loss_initial is not None
    assert record.progress.tokens_per_second is not None
    beat = await cluster.beat(agent)
    assert (beat.jobs.keys(), beat.device) == ({cluster.a}, "cpu")
    assert "coserve_job_step" in await cluster.metrics(agent)
    cluster.feed(cluster.a)
    result = await cluster.result(cluster.a)
    assert isinstance(result, Completed), result
    assert result.adapter is not None
    assert (result.step, result.adapter.path) == (cluster.steps, f"adapters/{cluster.endpoint_uid}/tuned/v1")
    assert result.eval_loss is not None
    assert result.eval_loss_initial is not None
    assert result.eval_loss < result.eval_loss_initial
    assert result.tokens == sum(material.shard(n).tokens for n in range(1, cluster.steps + 1))
    cluster.check_adapter(result, material)
    folders = sorted(path.name for path in (cluster.artifacts / f"jobs/{cluster.a}/e1").iterdir())
    assert folders == ["s20", f"s{cluster.steps}"]
    await cluster.store.set_adapters([AdapterRecord(**result.adapter.model_dump(), job_uid=cluster.a, rank=4)])

    async def listed() -> bool:
        return (await cluster.beat(agent)).adapters == {"tuned": 1}

    await cluster.until(listed)
    async with openai.AsyncOpenAI(base_url=await cluster.url(agent, "http") + "/v1", api_key="none") as client:
        models = {model.id: model for model in (await client.models.list()).data}
        assert models["tuned"].parent == "base"  # type: ignore[attr-defined]
        options: dict[str, Any] = {"prompt": "one two 3", "max_tokens": 20, "temperature": 0}
        tuned = await client.completions.create(model="tuned", **options)
        base = await client.completions.create(model="base", **options)
    assert tuned.choices[0].text != base.choices[0].text
    assert "three" in tuned.choices[0].text
    metrics = await cluster.metrics(agent)
    assert 'coserve_tokens_total{kind="backward"}' in metrics


async def test_a_pool_of_one_sample_trains_the_same(cluster: Any) -> None:
    """A step's samples need more pages than there are; they become more passes, whose gradients are added."""
    (usual,) = await cluster.agents(1)
    material = cluster.feed(cluster.a)
    await cluster.bind(cluster.a, usual)
    expected = await cluster.result(cluster.a)
    small = await cluster.agent(kv_cache_bytes=5 * 16384)
    assert "4 KV pages" in small.whole_log
    assert max(sum(-(-len(one.tokens) // 64) for one in material.shard(n).samples) for n in range(1, 25)) > 4
    cluster.feed(cluster.b)
    await cluster.bind(cluster.b, small, adapter_name="small")
    result = await cluster.result(cluster.b)
    assert isinstance(result, Completed), result
    cluster.check_adapter(result, material)
    assert result.loss == pytest.approx(expected.loss, rel=1e-4)
    assert result.eval_loss == pytest.approx(expected.eval_loss, rel=1e-4)


async def test_two_jobs_of_one_agent_are_each_as_if_alone(cluster: Any) -> None:
    """One of twice the share, both of the same data and seed: the same adapter, whatever came between their steps."""
    agent = await cluster.agent(max_concurrent_jobs=2)
    assert (await cluster.beat(agent)).max_jobs == 2
    changes: dict[str, Any] = {"dropout": 0.1, "eval_every_steps": 7, "publish": PublishPolicy.IF_EVAL_IMPROVES}
    material = await cluster.feed_some(cluster.a, 4)
    await cluster.feed_some(cluster.b, 4)
    await cluster.bind(cluster.a, agent, priority=1, **changes)
    await cluster.bind(cluster.b, agent, adapter_name="other", **changes)

    async def both() -> bool:
        return (await cluster.beat(agent)).jobs.keys() == {cluster.a, cluster.b}

    await cluster.until(both)
    cluster.feed(cluster.a)
    cluster.feed(cluster.b)
    results = [await cluster.result(job) for job in (cluster.a, cluster.b)]
    assert all(isinstance(result, Completed) for result in results), results
    first, second = (cluster.check_adapter(result, material) for result in results)
    assert first == second
    assert results[0].adapter.path != results[1].adapter.path


async def test_a_rank_above_the_endpoints_is_refused(cluster: Any) -> None:
    agent = await cluster.agent(max_rank=2)
    cluster.feed(cluster.a)
    await cluster.bind(cluster.a, agent)
    result = await cluster.result(cluster.a)
    assert isinstance(result, Released), result
    assert result.reason == "RankTooLarge"
    assert "2 (finetuning.maxRank)" in result.message


async def test_samples_longer_than_the_context_are_refused(cluster: Any) -> None:
    agent = await cluster.agent(max_model_length=64)
    cluster.feed(cluster.a)
    await cluster.bind(cluster.a, agent)
    result = await cluster.result(cluster.a)
    assert isinstance(result, Failed), result
    assert result.reason == "InvalidDataset"
    assert "model.maxModelLength 64" in result.message


async def test_a_wrong_redis_password_is_said_and_serving_goes_on(cluster: Any, client: httpx.AsyncClient) -> None:
    program = cluster.programs.start("main", **cluster.variables | {"redis_password": "wrong"})
    admin = await cluster.url(program, "admin")

    async def ready() -> bool:
        return (await client.get(f"{admin}/ready")).status_code == 200

    await cluster.until(ready, 90)
    assert "check COSERVE_REDIS_USERNAME and COSERVE_REDIS_PASSWORD" in program.log
    http = await cluster.url(program, "http")
    body = {"model": "base", "prompt": "one"}
    assert (await client.post(f"{http}/v1/completions", json=body)).status_code == 200
    assert (await client.post(f"{http}/v1/completions", json=body | {"model": "tuned"})).status_code == 503
