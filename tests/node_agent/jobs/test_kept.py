"""What jobs keep: evaluations, the best weights, and the adapter that they went on from, through Redis and a kill."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from coserve_api.job import PublishPolicy
from coserve_contract.messages import AdapterRecord, Checkpoint, Completed, Failed, Released, Start

BEST: dict[str, Any] = {"publish": PublishPolicy.BEST, "eval_every_steps": 2, "learning_rate": 5e-2}
CONTINUED: dict[str, Any] = {"rank": None, "alpha": None, "target_modules": None}


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


async def test_the_best_of_a_killed_job_is_that_of_one_that_ran_through(cluster: Any) -> None:
    first, second = await cluster.agents()
    cluster.feed(cluster.a)
    await cluster.bind(cluster.a, second, **BEST)
    undisturbed = await cluster.result(cluster.a)
    assert isinstance(undisturbed, Completed), undisturbed
    assert undisturbed.best is not None
    assert undisturbed.best.step > 0
    assert undisturbed.adapter is not None
    whole = cluster.artifacts / undisturbed.adapter.path
    evaluations = rows(whole, "evaluations.jsonl")
    assert [row["step"] for row in evaluations] == list(range(0, cluster.steps + 1, 2))
    assert min((row["loss"], row["step"]) for row in evaluations) == (undisturbed.best.loss, undisturbed.best.step)
    assert [one.step for one in undisturbed.evaluations] == [row["step"] for row in evaluations][-10:]
    await cluster.feed_some(cluster.b, 13)
    await cluster.bind(cluster.b, first, adapter_name="killed", **BEST)
    record = await cluster.step_reached(cluster.b, 13)
    assert record.progress is not None
    assert record.progress.best is not None
    assert f'coserve_job_eval_loss{{job="name-of-{cluster.b}"}}' in await cluster.metrics(first)
    cluster.feed(cluster.b)
    await asyncio.sleep(0.3)  # somewhere in the middle of what follows
    first.kill()
    record = await cluster.record(cluster.b)
    assert record.result is None
    await cluster.bind(cluster.b, second, resume=record.checkpoint, adapter_name="killed", **BEST)
    result = await cluster.result(cluster.b)
    assert isinstance(result, Completed), result
    assert result.adapter is not None
    parts = cluster.artifacts / result.adapter.path
    assert weights(parts) == weights(whole)
    assert rows(parts, "evaluations.jsonl") == evaluations
    assert (result.best, result.evaluations) == (undisturbed.best, undisturbed.evaluations)
    # Negative control: where the best is not the end, other weights are published than the last.
    last = cluster.artifacts / f"jobs/{cluster.a}/e1/s{cluster.steps}"
    assert (weights(whole) == weights(last)) == (undisturbed.best.step == cluster.steps)


async def test_held_out_samples_go_through_a_window_and_come_back_where_their_file_is_damaged(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses and the weights are those of a job whose samples lay in Redis as a whole."""
    first, second = await cluster.agents()
    cluster.feed(cluster.a)
    await cluster.bind(cluster.a, second, **BEST)
    undisturbed = await cluster.result(cluster.a)
    assert isinstance(undisturbed, Completed), undisturbed
    await cluster.feed_some(cluster.b, 13)
    await cluster.bind(cluster.b, first, adapter_name="narrow", **BEST)
    record = await cluster.step_reached(cluster.b, 13)
    assert record.progress.eval_cursor == cluster.material.eval_shards == 2
    assert await cluster.store.read_eval(cluster.b) == []
    first.kill()
    file = cluster.artifacts / "jobs" / cluster.b / "held_out.shards"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    monkeypatch.setattr("coserve_agent.feeder.SHARD_BOUND", 1)
    cluster.feed(cluster.b)
    await cluster.bind(cluster.b, second, resume=record.checkpoint, adapter_name="narrow", **BEST)
    result = await cluster.result(cluster.b)
    assert isinstance(result, Completed), result
    assert (result.best, result.evaluations) == (undisturbed.best, undisturbed.evaluations)
    published = [cluster.artifacts / one.adapter.path for one in (undisturbed, result)]
    assert weights(published[0]) == weights(published[1])

    async def removed() -> bool:
        return not file.exists()

    await cluster.until(removed)


async def test_a_job_without_patience_left_is_complete_and_its_feeder_ends(cluster: Any) -> None:
    """It learns nothing, so all losses are equal: the earliest is the best, and there is nothing to publish."""
    agent = await cluster.agent()
    cluster.feed(cluster.a)
    await cluster.bind(cluster.a, agent, **BEST | {"learning_rate": 1e-30, "patience": 2})
    result = await cluster.result(cluster.a)
    assert isinstance(result, Completed), result
    assert result.best is not None
    assert (result.best.step, result.step, result.adapter) == (0, 4, None)
    assert [one.step for one in result.evaluations] == [0, 2, 4]
    assert len({one.loss for one in result.evaluations}) == 1
    await asyncio.wait_for(cluster.tasks[-1], 30)
    assert "coserve_job_eval_loss{" not in await cluster.metrics(agent)


async def test_a_job_goes_on_from_a_published_adapter(cluster: Any) -> None:
    """Its first evaluation is the last of the job that trained the adapter, to the bit; its shape is taken over."""
    agent = await cluster.agent()
    cluster.feed(cluster.a)
    await cluster.bind(cluster.a, agent, rank=3, alpha=7, target_modules=("q_proj", "down_proj"))
    before = await cluster.result(cluster.a)
    assert isinstance(before, Completed), before
    assert before.adapter is not None
    assert before.rank == 3
    cluster.feed(cluster.b)
    start = Start(path=before.adapter.path, sha256=before.adapter.sha256, rank=3)
    await cluster.bind(cluster.b, agent, adapter_name="after", start=start, **CONTINUED)
    after = await cluster.result(cluster.b)
    assert isinstance(after, Completed), after
    assert after.adapter is not None
    assert (after.eval_loss_initial, after.rank) == (before.eval_loss, 3)
    assert before.eval_loss_initial != before.eval_loss != after.eval_loss
    config = json.loads((cluster.artifacts / after.adapter.path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (3, 7, ["q_proj", "down_proj"])
    assert config["base_model_name_or_path"] == str(cluster.variables["model_path"])
    await cluster.store.set_adapters([AdapterRecord(**after.adapter.model_dump(), job_uid=cluster.b, rank=3)])

    async def listed() -> bool:
        return (await cluster.beat(agent)).adapters == {"after": 1}

    await cluster.until(listed)


def resumed(source: Checkpoint, **shape: Any) -> dict[str, Any]:
    return CONTINUED | {"start": Start(path=source.path, sha256=source.sha256, **shape), "resume": source}


async def test_a_job_resumes_from_another_jobs_checkpoint_to_the_bits_of_one_that_ran_through(cluster: Any) -> None:
    agent = await cluster.agent()
    material = cluster.feed(cluster.b)
    await cluster.bind(cluster.b, agent, adapter_name="whole")
    expected = cluster.check_adapter(await cluster.result(cluster.b), material)
    await cluster.feed_some(cluster.a, 13)
    await cluster.bind(cluster.a, agent, adapter_name="first")
    source = (await cluster.step_reached(cluster.a, 13)).checkpoint
    await cluster.store.delete_job(cluster.a)  # as its FinetuneJob's end does
    other = f"{cluster.a}-resumed"
    cluster.feed(other)
    await cluster.bind(other, agent, adapter_name="resumed", **resumed(source, rank=4))
    result = await cluster.result(other)
    assert isinstance(result, Completed), result
    assert (source.step, result.step, result.rank) == (10, cluster.steps, 4)
    assert cluster.check_adapter(result, material) == expected
    assert sorted(path.name for path in (cluster.artifacts / f"jobs/{other}/e1").iterdir()) == ["s20", "s24"]
    assert (cluster.artifacts / source.path).is_dir(), "the other job's checkpoint is left alone"


async def test_a_checkpoint_that_does_not_fit_is_refused_by_name(cluster: Any) -> None:
    agent = await cluster.agent()
    cluster.feed(cluster.a)
    await cluster.bind(cluster.a, agent, publish=PublishPolicy.NEVER)
    assert isinstance(await cluster.result(cluster.a), Completed)
    source = (await cluster.record(cluster.a)).checkpoint
    cluster.feed(cluster.b)
    await cluster.bind(cluster.b, agent, **resumed(source, rank=16))
    failed = await cluster.result(cluster.b)
    assert isinstance(failed, Failed), failed
    assert failed.reason == "InvalidCheckpoint"
    assert "resumeFrom: the job's adapter.rank is 16, and the checkpoint's is 4" in failed.message
    changed = source.model_copy(update={"sha256": "0" * 64})
    third = f"{cluster.b}-third"
    cluster.feed(third)
    await cluster.bind(third, agent, **resumed(changed))
    released = await cluster.result(third)
    assert isinstance(released, Released), released
    assert released.reason == "ArtifactStoreError"
    assert f"expected {'0' * 64}" in released.message
    assert "resumeFrom" in released.message


async def test_an_adapter_that_is_not_what_the_job_says_fails_it_by_name(cluster: Any) -> None:
    agent = await cluster.agent()
    cluster.feed(cluster.a)
    cluster.feed(cluster.b)
    await cluster.bind(cluster.a, agent, checkpoint_every_steps=1000)
    before = await cluster.result(cluster.a)
    start = Start(path=before.adapter.path, sha256=before.adapter.sha256, rank=16)
    await cluster.bind(cluster.b, agent, start=start, **CONTINUED)
    failed = await cluster.result(cluster.b)
    assert isinstance(failed, Failed), failed
    assert failed.reason == "InvalidAdapter"
    assert "adapter.rank is 16" in failed.message
    assert "4" in failed.message


async def test_a_version_that_was_changed_is_not_gone_on_from(cluster: Any) -> None:
    agent = await cluster.agent()
    for job, sha256 in ((cluster.a, "0" * 64), (cluster.b, None)):
        cluster.feed(job)
        await cluster.bind(job, agent, start=Start(path="adapters/none", sha256=sha256), **CONTINUED)
        released = await cluster.result(job)
        assert isinstance(released, Released), released
        assert released.reason == "ArtifactStoreError"
        assert "adapter.from" in released.message
