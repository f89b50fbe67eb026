"""Shards in Redis are a function of file, seed and cursor, and never more than agent and Redis can hold."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from feeding import JOB, KEYS, Task, accept, finished, has, prepared, read, until
from hypothesis import given
from hypothesis import strategies as st

from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.data.material import Material
from coserve_agent.feeder import Feeder, room
from coserve_contract.connect import command
from coserve_contract.messages import Completed
from coserve_contract.shards import Shard
from coserve_contract.store import SHARD_BOUND, WINDOW_BYTES, Store


async def test_shards_are_pushed_up_to_the_bound_and_follow_the_cursor(store: Store, material: Material) -> None:
    async with Task(store, material) as task:
        await until(lambda: has(store, SHARD_BOUND))
        status = await store.feed(JOB)
        assert status == material.status()
        assert (status.total_steps, status.samples, status.eval_samples, status.eval_shards) == (48, 36, 4, 2)
        assert (status.digest, status.finished) == (material.digest, False)
        assert len(await read(store, 0)) == SHARD_BOUND
        held_out = {sample.id for shard in await store.read_eval(JOB) for sample in shard.samples}
        assert len(held_out) == 4
        first = await read(store, 0)
        await accept(store, 20)
        await until(lambda: has(store, 48))
        await until(lambda: finished(store))
        rest = await read(store, 20)
        shards = {shard.seq: shard for shard in [*first, *rest]}
        assert sorted(shards) == list(range(1, 49))
        assert all(shards[number] == material.shard(number) for number in shards)
        for epoch in range(4):
            ids = [sample.id for shard in shards.values() if shard.epoch == epoch for sample in shard.samples]
            assert len(ids) == len(set(ids)) == 36
            assert not held_out & set(ids)
        assert not task.done()
        await command(store.redis, "SET", KEYS.result(JOB), Completed(epoch=1, step=48).dumps())
        await asyncio.wait_for(task, 10)


@given(st.lists(st.integers(1, 3 * WINDOW_BYTES // 2), max_size=80), st.integers(0, 80))
def test_what_is_ahead_of_the_reader_is_bounded_by_count_and_bytes(sizes: list[int], read: int) -> None:
    read = min(read, len(sizes))
    last = room(read, len(sizes), lambda number: sizes[number - 1])
    ahead = sizes[read:last]
    assert len(ahead) <= SHARD_BOUND
    assert sum(ahead) <= WINDOW_BYTES or len(ahead) == 1
    more = sizes[read : last + 1]
    full = last == len(sizes) or len(more) > SHARD_BOUND or sum(more) > WINDOW_BYTES
    assert full, "it stops no earlier"
    assert last > read or read == len(sizes), "a job never stands still"


async def test_large_shards_are_fewer_in_both_streams(
    store: Store, variables: dict[str, object], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    material = prepared(tokenizer, variables, eval_percent=40)
    most = max(map(material.shard_bytes, range(1, 10)))
    monkeypatch.setattr("coserve_agent.feeder.WINDOW_BYTES", 3 * most)
    async with Task(store, material):
        await until(lambda: has(store, 3))
        await asyncio.sleep(1)
        assert 3 <= (await store.job(JOB)).last_shard <= 4
        assert 1 <= len(await store.read_eval(JOB, 0, 99)) <= 4
        await accept(store, 20)
        await until(lambda: has(store, 23))


async def test_500_queued_jobs_of_400_000_rows_are_a_few_kb_each(store: Store, material: Material) -> None:
    status = material.status().model_copy(
        update={"samples": 380_000, "eval_samples": 20_000, "eval_shards": 2_500, "total_steps": 47_500}
    )
    for number in range(500):
        feeder = Feeder(store, f"job-{number}", material)
        feeder._status = status
        await feeder.check()
    keys = await command(store.redis, "KEYS", "*:job:job-*")
    assert len(keys) == 500
    assert sum([await command(store.redis, "MEMORY", "USAGE", key) for key in keys]) < 500 * 4096


async def test_a_restarted_feeder_goes_on_where_the_stream_ends(store: Store, material: Material) -> None:
    async with Task(store, material):
        await until(lambda: has(store, SHARD_BOUND))
    before = await read(store, 0)
    await accept(store, 10)
    async with Task(store, material):
        await until(lambda: has(store, 42))
    assert await read(store, 10) == [*before[10:], *(material.shard(number) for number in range(33, 43))]


async def test_an_emptied_redis_is_filled_again_from_the_cursor(store: Store, material: Material) -> None:
    await store.set_incarnation("first")
    async with Task(store, material):
        await until(lambda: has(store, SHARD_BOUND))
        before = await read(store, 0)
        held_out = await store.read_eval(JOB)
        await command(store.redis, "FLUSHALL")
        await accept(store, 5)
        await store.set_incarnation("second")
        await until(lambda: has(store, 5 + SHARD_BOUND), 30)
        assert (await read(store, 5))[: SHARD_BOUND - 5] == before[5:]
        await until(lambda: same_eval(store, held_out))
        assert await store.feed(JOB) is not None


async def same_eval(store: Store, expected: list[Shard]) -> bool:
    return await store.read_eval(JOB) == expected


async def test_a_deleted_job_is_left_alone(store: Store, material: Material) -> None:
    await store.set_incarnation("first")
    async with Task(store, material) as task:
        await until(lambda: has(store, SHARD_BOUND))
        await store.delete_job(JOB)
        await asyncio.wait_for(task, 10)
        assert await store.feed(JOB) is None


async def test_two_machines_make_the_same_shards(
    variables: dict[str, object], model_folder: Path, material: Material
) -> None:
    again, other = (prepared(Tokenizer(model_folder), variables, seed=seed) for seed in (1, 2))
    numbers = range(1, 49)
    assert [again.shard(n) for n in numbers] == [material.shard(n) for n in numbers]
    assert [other.shard(n) for n in numbers] != [material.shard(n) for n in numbers]
    assert again.eval_shard(1) == material.eval_shard(1)
