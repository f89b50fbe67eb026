"""Held-out samples go through Redis once, a window at a time, into a file that an evaluation reads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from binding_specs import binding_spec
from redis.asyncio import Redis

from coserve_agent.concurrency import alongside, end
from coserve_agent.errors import JobFailedError
from coserve_agent.jobs.held_out import NAME, HeldOut
from coserve_agent.jobs.shard_reader import ShardReader
from coserve_contract.connect import command
from coserve_contract.keys import Keys
from coserve_contract.messages import Binding, FeedStatus, Progress
from coserve_contract.scripts import Binder, Fencing
from coserve_contract.shards import Sample, Shard
from coserve_contract.store import SHARD_BOUND, Push, Store

JOB = "job-1"
KEYS = Keys("endpoint-1")
DIGEST = "ab" * 32
COUNT = 150
FEED = FeedStatus(total_steps=9, eval_shards=COUNT, digest=DIGEST, windowed=True)


def shard(number: int) -> Shard:
    samples = tuple(Sample(10 * number + n, (number, n, 7), (0.0, 1.0, 0.5), n) for n in range(3))
    return Shard(number, 0, DIGEST, samples)


SAMPLES = [sample for number in range(1, COUNT + 1) for sample in shard(number).samples]


def written(folder: Path, feed: FeedStatus = FEED, epoch: int = 1) -> HeldOut:
    made = HeldOut(folder, epoch, feed)
    made.begin()
    made.append(map(shard, range(1, 100)))
    made.append(map(shard, range(100, COUNT + 1)))
    made.finish()
    return made


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    assert not HeldOut(tmp_path / "job", 1, FEED).is_whole()
    assert list(written(tmp_path / "job").samples()) == SAMPLES
    assert HeldOut(tmp_path / "job", 2, FEED).is_whole(), "another agent finds it"
    assert [one.name for one in (tmp_path / "job").iterdir()] == [NAME]


def test_a_part_is_not_the_whole_and_goes_when_it_is_begun_anew(tmp_path: Path) -> None:
    part = HeldOut(tmp_path, 1, FEED)
    part.begin()
    part.append([shard(1)])
    assert not HeldOut(tmp_path, 2, FEED).is_whole()
    written(tmp_path, epoch=2)
    assert [one.name for one in tmp_path.iterdir()] == [NAME]


@pytest.mark.parametrize("change", [{"content": "cd" * 32}, {"digest": "ef" * 32}, {"eval_shards": 149}])
def test_samples_of_other_data_are_not_taken(tmp_path: Path, change: dict[str, Any]) -> None:
    written(tmp_path)
    assert not HeldOut(tmp_path, 1, FEED.model_copy(update=change)).is_whole()


def test_every_damaged_byte_shows(tmp_path: Path) -> None:
    held_out = written(tmp_path)
    whole = (tmp_path / NAME).read_bytes()
    for place in [*range(0, 1200), *range(1200, len(whole), 997), len(whole) - 1]:
        (tmp_path / NAME).write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        assert not held_out.is_whole(), place
    for cut in (whole[:-1], whole[: len(whole) // 2], b"", whole + b"\n"):
        (tmp_path / NAME).write_bytes(cut)
        assert not held_out.is_whole()
    with pytest.raises(JobFailedError, match=r"held_out\.shards do not read") as caught:
        list(held_out.samples())
    assert caught.value.reason == "ArtifactStoreError"


# ---- through Redis ----


class Rig:
    """An agent's reader, its lease, and a feeder that knows its part of the contract."""

    def __init__(self, redis: Redis, folder: Path, make_binding: Any) -> None:
        self.store, self.folder = Store(redis, KEYS), folder
        self.fencing, self.binder, self.binding = Fencing(redis, KEYS, "agent-1"), Binder(redis, KEYS), make_binding
        self.most = 0
        self.epoch = 0

    async def bind(self) -> None:
        self.epoch += 1
        await self.store.set_incarnation("i")
        self.fencing.register("i")
        assert await self.binder.bind(JOB, "agent-1", self.binding(self.epoch)) is None
        await self.fencing.take_lease(JOB, self.epoch)

    def reader(self, feed: FeedStatus = FEED) -> ShardReader:
        held_out = HeldOut(self.folder, self.epoch, feed)
        return ShardReader(self.store, JOB, after=0, total=9, held_out=held_out, windowed=feed.windowed, digest=DIGEST)

    async def feed(self, bound: int = SHARD_BOUND) -> None:
        """A feeder's rounds; it notes how many held-out shards Redis held at most."""
        while True:
            number = 1
            while number <= COUNT:
                pushed = await self.store.push_eval(JOB, shard(number), bound)
                if pushed.outcome is Push.FULL:
                    break
                number = pushed.last + 1
                self.most = max(self.most, await command(self.store.redis, "XLEN", KEYS.eval(JOB)))
            await asyncio.sleep(0.01)

    async def report(self, reader: ShardReader) -> None:
        while True:
            progress = Progress(epoch=self.epoch, step=0, cursor=0, total_steps=9, eval_cursor=reader.eval_cursor)
            assert await self.fencing.report_progress(JOB, progress) is None
            await asyncio.sleep(0.01)

    async def evaluate(self, reader: ShardReader) -> list[Sample]:
        """The samples of an evaluation, with a feeder beside it."""
        found: list[Sample] = []

        async def once() -> None:
            await reader.look_for_held_out()
            found.extend(await reader.eval_samples())

        feeder = asyncio.create_task(self.feed())
        try:
            async with asyncio.timeout(30):
                await alongside(once(), self.report(reader))
        finally:
            await end(feeder)
        return found


async def kept(reader: ShardReader, number: int) -> None:
    async with asyncio.timeout(30):
        while (reader.eval_cursor or 0) < number:
            reader.kept_more.clear()
            await reader.kept_more.wait()


@pytest.fixture
async def rig(redis: Redis, tmp_path: Path) -> AsyncIterator[Rig]:
    yield Rig(redis, tmp_path / "job", lambda epoch: Binding(epoch=epoch, spec=binding_spec(JOB)))


async def test_redis_holds_a_window_of_them_and_nothing_in_the_end(rig: Rig) -> None:
    await rig.bind()
    reader = rig.reader()
    assert await rig.evaluate(reader) == SAMPLES
    assert rig.most == SHARD_BOUND
    assert list(await reader.eval_samples()) == SAMPLES, "the next evaluation reads the file"
    progress = Progress(epoch=1, step=0, cursor=0, total_steps=9, eval_cursor=reader.eval_cursor)
    await rig.fencing.report_progress(JOB, progress)
    assert await command(rig.store.redis, "EXISTS", KEYS.eval(JOB)) == 0


async def test_the_next_agent_finds_the_file_or_asks_again(rig: Rig) -> None:
    await rig.bind()
    await rig.evaluate(rig.reader())
    await rig.bind()
    reader = rig.reader()
    await reader.look_for_held_out()
    assert list(await reader.eval_samples()) == SAMPLES, "without a feeder"
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:-9]), lambda path: path.unlink()):
        damage(rig.folder / NAME)
        await rig.bind()
        assert await rig.evaluate(rig.reader()) == SAMPLES


async def test_an_agent_cut_off_in_between_leaves_the_next_all_of_them(rig: Rig) -> None:
    await rig.bind()
    first = rig.reader()
    tasks = [asyncio.create_task(one) for one in (rig.feed(), rig.report(first), first.eval_samples())]
    await kept(first, 40)
    await end(*tasks)
    assert not (rig.folder / NAME).exists()
    await rig.bind()
    assert await rig.evaluate(rig.reader()) == SAMPLES


async def test_an_emptied_redis_is_filled_where_the_file_ends(rig: Rig) -> None:
    await rig.bind()
    reader = rig.reader()
    feeder, reading = (asyncio.create_task(one) for one in (rig.feed(), reader.eval_samples()))
    report = asyncio.create_task(rig.report(reader))
    await kept(reader, 40)
    await end(report, feeder)
    await command(rig.store.redis, "FLUSHALL")
    rig.epoch -= 1
    await rig.bind()
    feeder, report = asyncio.create_task(rig.feed()), asyncio.create_task(rig.report(reader))
    assert list(await asyncio.wait_for(reading, 30)) == SAMPLES
    await end(report, feeder)


async def test_what_a_feeder_of_the_version_before_pushed_stays_in_redis(rig: Rig) -> None:
    """It would push nothing more once its first shard is gone."""
    await rig.bind()
    reader = rig.reader(FEED.model_copy(update={"windowed": False}))
    for number in range(1, COUNT + 1):
        await rig.store.push_eval(JOB, shard(number), COUNT)
    report = asyncio.create_task(rig.report(reader))
    assert list(await reader.eval_samples()) == SAMPLES
    assert reader.eval_cursor is None
    await end(report)
    assert len(await rig.store.read_eval(JOB, 0, 999)) == COUNT


async def test_the_stream_takes_no_more_memory_however_many_shards_went_through(rig: Rig) -> None:
    """redis/redis#8635: entries that XTRIM took away can go on taking memory in a stream's node."""
    await rig.bind()
    most = 0
    for number in range(1, 2001):
        await rig.store.push_eval(JOB, shard(number))
        if number % 20 == 0:
            progress = Progress(epoch=1, step=0, cursor=0, total_steps=9, eval_cursor=number - 10)
            assert await rig.fencing.report_progress(JOB, progress) is None
        most = max(most, await command(rig.store.redis, "MEMORY", "USAGE", KEYS.eval(JOB)))
    assert most < SHARD_BOUND * 2048


def test_a_shard_is_in_memory_at_a_time(tmp_path: Path) -> None:
    samples = written(tmp_path).samples()
    assert next(samples) == SAMPLES[0]
    with (tmp_path / NAME).open("r+b") as file:
        file.truncate((tmp_path / NAME).stat().st_size // 2)
    read = 0
    with pytest.raises(JobFailedError):
        for _ in samples:
            read += 1
    assert 0 < read < len(SAMPLES) - 1
