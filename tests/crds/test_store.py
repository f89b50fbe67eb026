"""The shards' way through Redis, and what agents and the operator read there."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from backends import BOTH
from pydantic import ValidationError

from coserve_api.errors import InvalidValueError, MessageError, ShardError
from coserve_contract.connect import command
from coserve_contract.keys import Keys, agent_id
from coserve_contract.messages import AdapterRecord, BindingSpec, Completed, FeedStatus, Heartbeat
from coserve_contract.store import SHARD_BOUND, JobRecord, Push, Store, endpoint_uids

JOB = "job-1"


async def push_all(world, messages, numbers) -> None:
    for seq in numbers:
        assert (await world.store.push_shard(JOB, messages.shard(seq))).outcome is Push.ADDED


async def start(world, messages) -> None:
    await world.binder.bind(JOB, world.a.agent, messages.binding(1))
    await world.a.take_lease(JOB, 1)


@BOTH
async def test_shards_come_out_as_they_went_in(world, messages) -> None:
    await push_all(world, messages, range(1, 4))
    assert await world.store.read_shards(JOB, 0, 2) == [messages.shard(1), messages.shard(2)]
    assert await world.store.read_shards(JOB, 2, 9) == [messages.shard(3)]
    assert await world.store.read_shards(JOB, 3) == []
    await world.store.push_eval(JOB, messages.shard(1))
    assert await world.store.read_eval(JOB) == [messages.shard(1)]


@BOTH
async def test_the_feeder_may_send_again_but_leaves_no_gap(world, messages) -> None:
    await push_all(world, messages, [1, 2])
    again = await world.store.push_shard(JOB, messages.shard(1))
    assert (again.outcome, again.last) == (Push.PRESENT, 2)
    ahead = await world.store.push_shard(JOB, messages.shard(4))
    assert (ahead.outcome, ahead.last) == (Push.GAP, 2)
    assert (await world.store.push_eval(JOB, messages.shard(2))).outcome is Push.GAP
    assert (await world.store.push_eval(JOB, messages.shard(1))).outcome is Push.ADDED
    assert (await world.store.push_eval(JOB, messages.shard(1))).outcome is Push.PRESENT


def kept(messages, number, epoch=1):
    """What an agent says that has the held-out shards up to `number` in its own keeping."""
    return messages.progress(epoch, 1).model_copy(update={"eval_cursor": number})


async def push_eval(world, messages, last, first=1) -> Push:
    """What became of the last of these held-out shards."""
    for seq in range(first, last + 1):
        pushed = await world.store.push_eval(JOB, messages.shard(seq))
    return pushed.outcome


@BOTH
async def test_held_out_shards_go_through_a_window_that_follows_the_agent(world, messages) -> None:
    assert await push_eval(world, messages, SHARD_BOUND) is Push.ADDED
    assert await push_eval(world, messages, SHARD_BOUND + 1) is Push.FULL
    await start(world, messages)
    await world.a.report_progress(JOB, kept(messages, 10))
    assert [one.seq for one in await world.store.read_eval(JOB, 10, 99)] == list(range(11, SHARD_BOUND + 1))
    assert await push_eval(world, messages, SHARD_BOUND + 10) is Push.ADDED
    assert await push_eval(world, messages, SHARD_BOUND + 11) is Push.FULL
    await world.a.report_progress(JOB, kept(messages, SHARD_BOUND + 10))
    assert (await world.store.job(JOB)).streamed == 0
    assert await push_eval(world, messages, SHARD_BOUND + 10) is Push.PRESENT, "a feeder that comes back pushes none"


@BOTH
async def test_an_agent_that_has_lost_its_file_is_fed_from_the_first(world, messages) -> None:
    await start(world, messages)
    await push_eval(world, messages, 20)
    for before, last in ((5, 20), (20, 20)):
        await world.a.report_progress(JOB, kept(messages, before))
        await world.a.report_progress(JOB, kept(messages, 0))
        assert await world.store.read_eval(JOB, 0, 99) == [], "nothing that it cannot use"
        assert await push_eval(world, messages, last) is Push.ADDED
        assert [one.seq for one in await world.store.read_eval(JOB, 0, 99)] == list(range(1, last + 1))


@BOTH
async def test_a_new_binding_is_fed_from_the_first_until_it_says_more(world, messages) -> None:
    await start(world, messages)
    await push_eval(world, messages, 20)
    await world.a.report_progress(JOB, kept(messages, 15))
    await world.binder.bind(JOB, world.b.agent, messages.binding(2))
    assert await push_eval(world, messages, 3) is Push.ADDED
    assert len(await world.store.read_eval(JOB)) == 3
    await world.b.take_lease(JOB, 2)
    await world.b.report_progress(JOB, kept(messages, 20, 2))
    assert await push_eval(world, messages, 21, first=21) is Push.ADDED
    await world.b.accept_checkpoint(JOB, 2, messages.checkpoint(1, 2))
    await world.b.rewind(JOB, 2, None)
    assert await push_eval(world, messages, 1) is Push.ADDED


async def test_an_agent_of_the_version_before_gets_all_held_out_shards(world, messages) -> None:
    """It says no cursor, and reads the stream from its first shard on at each evaluation."""
    await push_eval(world, messages, SHARD_BOUND)
    await start(world, messages)
    await world.a.report_progress(JOB, messages.progress(1, 0))
    assert await push_eval(world, messages, SHARD_BOUND + 40) is Push.ADDED
    assert len(await world.store.read_eval(JOB, 0, 999)) == SHARD_BOUND + 40


@BOTH
async def test_the_feeder_stops_at_the_bound_and_goes_on_with_the_reader(world, messages) -> None:
    await start(world, messages)
    await push_all(world, messages, range(1, SHARD_BOUND + 1))
    assert (await world.store.push_shard(JOB, messages.shard(SHARD_BOUND + 1))).outcome is Push.FULL
    # no checkpoint yet, and the reader is at 5: a job that checkpoints more rarely than the bound must not stand still
    await world.a.report_progress(JOB, messages.progress(1, 5))
    await push_all(world, messages, range(SHARD_BOUND + 1, SHARD_BOUND + 6))
    assert (await world.store.push_shard(JOB, messages.shard(SHARD_BOUND + 6))).outcome is Push.FULL
    await world.a.accept_checkpoint(JOB, 1, messages.checkpoint(6))
    assert (await world.store.push_shard(JOB, messages.shard(SHARD_BOUND + 6))).outcome is Push.ADDED
    record = await world.store.job(JOB)
    assert record.last_shard == SHARD_BOUND + 6
    assert record.streamed == SHARD_BOUND


@BOTH
async def test_a_feeder_starts_anywhere_and_is_told_where_to_go_on(world, messages) -> None:
    await world.binder.bind(JOB, world.a.agent, messages.binding(2, resume=messages.checkpoint(40)))
    pushed = await world.store.push_shard(JOB, messages.shard(1))
    assert (pushed.outcome, pushed.last) == (Push.PRESENT, 40)
    await push_all(world, messages, [pushed.last + 1])


@BOTH
async def test_shards_fed_before_the_checkpoint_was_known_are_dropped(world, messages) -> None:
    await push_all(world, messages, range(1, 4))  # into an emptied Redis, before the operator was back
    await world.binder.bind(JOB, world.a.agent, messages.binding(2, resume=messages.checkpoint(40)))
    await push_all(world, messages, [41, 42])
    assert [shard.seq for shard in await world.store.read_shards(JOB, 40, 9)] == [41, 42]
    assert (await world.store.job(JOB)).last_shard == 42


@BOTH
async def test_two_feeders_write_each_shard_once(world, messages) -> None:
    async def feed() -> None:
        for seq in range(1, SHARD_BOUND + 1):
            await world.store.push_shard(JOB, messages.shard(seq))
            await asyncio.sleep(0)

    await asyncio.gather(feed(), feed())
    assert [shard.seq for shard in await world.store.read_shards(JOB, 0, 99)] == list(range(1, SHARD_BOUND + 1))


async def test_reading_takes_nothing_from_another_reader(world, messages) -> None:
    await push_all(world, messages, range(1, 4))
    stale = Store(world.redis, world.keys)
    assert len(await stale.read_shards(JOB, 0, 9)) == 3
    assert [shard.seq for shard in await world.store.read_shards(JOB, 0, 9)] == [1, 2, 3]


async def test_a_corrupt_shard_in_the_stream_is_named(world, messages) -> None:
    await command(world.redis, "XADD", world.keys.shards(JOB), "1-0", "v", "1", "seq", "1")
    with pytest.raises(ShardError, match="field epoch: is missing"):
        await world.store.read_shards(JOB, 0)


async def test_a_shard_under_anothers_number_is_refused(world, messages) -> None:
    await push_all(world, messages, [1])
    ((_, entry),) = await command(world.redis, "XRANGE", world.keys.shards(JOB), "-", "+")
    flat = [part for item in entry.items() for part in item] if isinstance(entry, dict) else entry
    await command(world.redis, "XADD", world.keys.shards(JOB), "2-0", *flat)
    with pytest.raises(ShardError, match="seq: is 1 under the ID 2-0"):
        await world.store.read_shards(JOB, 1)


@BOTH
async def test_a_record_holds_all_that_redis_knows(world, messages) -> None:
    assert await world.store.job(JOB) == JobRecord()
    await start(world, messages)
    feed = FeedStatus(total_steps=100, samples=500, eval_samples=25, finished=True)
    await world.store.set_feed(JOB, feed)
    await world.a.report_progress(JOB, messages.progress(1, 3))
    record = await world.store.job(JOB)
    assert record.feed == feed == await world.store.feed(JOB)
    assert record.progress == messages.progress(1, 3)
    assert record.owner == f"{world.a.agent}:1"
    assert record.broken == ()


async def test_a_broken_message_is_reported_and_hides_no_other(world, messages) -> None:
    await start(world, messages)
    await world.store.set_feed(JOB, FeedStatus(samples=7))
    await command(world.redis, "SET", world.keys.progress(JOB), '{"version": 2}')
    record = await world.store.job(JOB)
    assert record.feed == FeedStatus(samples=7)
    (error,) = record.broken
    assert (error.key, error.field, error.value) == (world.keys.progress(JOB), "version", "2")
    assert "update it" in error.remedy


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        (b"\xff", ""),
        (b"{", ""),
        (b"[]", ""),
        (b"[" + b"[1]," * 30_000 + b"1]", ""),
        (b"[" * 100_000, ""),
        (b'{"version":1,"max_jobs":' + b"9" * 5000 + b"}", ""),
        (b'{"version":1,"load":NaN}', ""),
        (b'{"version":1}', "agent_id"),
        (b'{"version":3}', "version"),
    ],
    ids=["no text", "an object", "a list", "a long list", "a deep one", "a long number", "NaN", "nothing", "version 3"],
)
def test_a_message_that_does_not_read_names_key_field_and_remedy(raw, field) -> None:
    with pytest.raises(MessageError) as caught:
        Heartbeat.loads("the:key", raw)
    assert (caught.value.key, caught.value.field) == ("the:key", field)
    assert str(caught.value).startswith("the:key: field ")
    assert len(str(caught.value)) < 500
    assert caught.value.remedy


def test_a_field_from_a_later_program_is_ignored(messages) -> None:
    text = messages.progress(1, 2).dumps()
    assert text.startswith('{"version":1,')
    assert messages.progress(1, 2) == type(messages.progress(1, 2)).loads("k", text.replace("{", '{"later":[1],', 1))


def test_a_result_that_is_no_number_is_not_written() -> None:
    with pytest.raises(ValueError, match="finite"):
        Completed(epoch=1, step=1, loss=float("nan"))


def test_a_path_in_a_message_stays_below_the_artifact_store(messages) -> None:
    record = AdapterRecord(name="x", number=1, path="adapters/x/v1", sha256="0" * 64, job_uid=JOB, rank=8)
    for path in ("/etc/passwd", "../x", "adapters/../../x", "", "a//b", "a\n"):
        with pytest.raises(MessageError, match="path"):
            AdapterRecord.loads("k", record.model_dump_json().replace("adapters/x/v1", path.replace("\n", "\\n")))


async def test_a_fleet_is_what_has_a_heartbeat(world, messages) -> None:
    await command(world.redis, "DEL", world.keys.agent(world.a.agent))  # its heartbeat ran out
    await command(world.redis, "SET", world.keys.agent(world.b.agent), "?")
    fleet = await world.store.fleet()
    assert fleet.agents == {}
    assert [error.key for error in fleet.broken] == [world.keys.agent(world.b.agent)]


@BOTH
async def test_published_adapters_are_replaced_as_a_whole(world) -> None:
    one, two, three = (
        AdapterRecord(name=name, number=1, path=f"adapters/{name}/v1", sha256="0" * 64, job_uid=JOB, rank=8)
        for name in ("one", "two", "three")
    )
    await world.store.set_adapters([one, two])
    assert (await world.store.published())[0] == {"one": one, "two": two}
    await world.store.set_adapters([three])
    assert (await world.store.published())[0] == {"three": three}
    await world.store.set_adapters([])
    assert (await world.store.published())[0] == {}


async def test_a_published_adapter_that_does_not_read_hides_no_other(world) -> None:
    one = AdapterRecord(name="one", number=1, path="adapters/one/v1", sha256="0" * 64, job_uid=JOB, rank=8)
    await world.store.set_adapters([one])
    await command(world.redis, "HSET", world.store.keys.adapters(), "odd", "{")
    records, broken = await world.store.published()
    assert records == {"one": one}
    assert "[odd]" in str(broken[0])


async def test_a_deleted_job_leaves_nothing(world, messages) -> None:
    before = set(await command(world.redis, "KEYS", "*"))
    await start(world, messages)
    await push_all(world, messages, [1])
    await world.store.push_eval(JOB, messages.shard(1))
    await world.store.set_feed(JOB, FeedStatus())
    await world.a.report_progress(JOB, messages.progress(1, 1))
    await world.a.accept_checkpoint(JOB, 1, messages.checkpoint(1))
    await world.a.finish(JOB, Completed(epoch=1, step=1))
    assert await world.store.job_uids() == {JOB}
    await world.store.delete_job(JOB)
    assert set(await command(world.redis, "KEYS", "*")) == before


async def test_a_deleted_endpoint_leaves_nothing(world, messages) -> None:
    await start(world, messages)
    assert await endpoint_uids(world.redis) == {"endpoint-1"}
    await world.store.delete_endpoint()
    assert await command(world.redis, "KEYS", "*") == []


@pytest.mark.parametrize("value", ["", "a:b", "a}b", "a*", "a b", "é", "x" * 129])
def test_no_key_can_be_made_to_name_another(value) -> None:
    with pytest.raises(InvalidValueError, match="must be 1 to 128"):
        Keys(value)
    with pytest.raises(InvalidValueError):
        Keys("endpoint").fence(value)
    with pytest.raises(InvalidValueError):
        agent_id("pod", value)


def test_every_key_of_a_job_is_deleted_with_it() -> None:
    source = (Path(__file__).parents[2] / "crds" / "coserve_contract" / "keys.py").read_text()
    assert len(Keys("e").all_of_job("j")) == source.count("return self._job(job,")


def test_a_binding_has_a_shape_or_an_adapter_to_go_on_from(messages) -> None:
    """Never both, never neither: an agent that knows no `start` must not read one that has it."""
    spec = messages.binding(1).model_dump(mode="json", exclude_none=True)["spec"]
    shape = ("rank", "alpha", "target_modules")
    anew = {name: value for name, value in spec.items() if name not in shape}
    for path in ("adapters/e/a/v1", "/models/claim/a"):
        assert BindingSpec.model_validate(anew | {"start": {"path": path}}).start is not None
    for path in ("../a", "/a/../b", "", "a//b"):
        with pytest.raises(ValidationError, match="path"):
            BindingSpec.model_validate(anew | {"start": {"path": path}})
    for wrong in (anew, spec | {"start": {"path": "a"}}):
        with pytest.raises(ValidationError, match="exactly where start is not"):
            BindingSpec.model_validate(wrong)
