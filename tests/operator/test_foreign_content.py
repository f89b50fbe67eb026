"""Whatever stands under one endpoint's keys, what is read of another is what it would be without."""

from __future__ import annotations

import asyncio
import resource
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_operator import SHA
from redis.asyncio import Redis

from coserve_contract.connect import command
from coserve_contract.keys import Keys
from coserve_contract.messages import AdapterRecord, Desired, FeedStatus
from coserve_contract.scripts import Binder, Fencing
from coserve_contract.store import JobRecord, Store
from coserve_operator.decide.binding import binding_of
from coserve_operator.decide.observed import RedisView, Unreadable
from coserve_operator.redis import bounded, reader
from coserve_operator.redis.bounded import connect_bounded
from coserve_operator.redis.store import OperatorStore

GOOD, BAD, JOB = "good", "bad", "j-1"
KEYS = Keys(BAD)
PLACES = (
    KEYS.incarnation(),
    KEYS.agents(),
    KEYS.agent("uid-p1.b1"),
    KEYS.agent("uid-p1.b1") + ":bindings",
    KEYS.adapters(),
    KEYS.jobs(),
    *KEYS.all_of_job(JOB),
)
BYTES = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [b"", b"a:b", b"}", b"9" * 40, b"-1", b"{}", b'{"version": 2}', b"[" * 200, b"\xff\xfe", b"x" * 500]
    ),
)
VALUES = st.one_of(
    st.tuples(st.just("SET"), BYTES),
    st.tuples(st.just("HSET"), BYTES, BYTES),
    st.tuples(st.just("HSET"), st.sampled_from([b"epoch", b"agent", JOB.encode()]), BYTES),
    st.tuples(st.just("SADD"), BYTES),
    st.tuples(st.just("ZADD"), st.just(b"1"), BYTES),
    st.tuples(st.just("RPUSH"), BYTES),
    st.tuples(st.just("XADD"), st.just(b"1-0"), BYTES, BYTES),
)


@pytest.fixture
async def store(redis: Redis, redis_server: Any) -> Any:
    """The operator's, of a Redis with an endpoint that has an agent, a bound job and an adapter."""
    client = connect_bounded(redis_server.url, None, redis_server.password)
    made = OperatorStore(client, b"key", lambda: 0.0)
    await made.check()
    yield made
    await client.aclose()


async def endpoint(redis: Redis, make: Any, uid: str) -> None:
    keys = Keys(uid)
    beat = make.heartbeat("p1")
    store, agent = Store(redis, keys), Fencing(redis, keys, beat.agent_id)
    await store.set_incarnation("i")
    await agent.heartbeat(beat)
    await command(redis, "PERSIST", keys.agent(beat.agent_id))
    binding = binding_of(make.job(), make.endpoint(), 1, Desired.RUN, 1, 0, JobRecord())
    assert await Binder(redis, keys).bind(JOB, beat.agent_id, binding) is None
    await store.set_adapters([AdapterRecord(name="a", number=1, path="p", sha256=SHA, job_uid=JOB, rank=8)])


async def test_what_is_read(redis: Redis, store: OperatorStore, make: Any) -> None:
    await endpoint(redis, make, GOOD)
    view = (await store.read({GOOD: [JOB]}))[GOOD]
    assert isinstance(view, RedisView)
    (agent,) = view.agents
    assert view.jobs[JOB].fence is not None
    assert view.bindings[JOB].epoch == 1
    assert view.jobs[JOB].fence.agent == agent
    assert (view.incarnation, view.known_jobs, list(view.adapters), view.broken) == ("i", {JOB}, ["a"], ())


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(where=st.lists(st.tuples(st.sampled_from(PLACES), VALUES), min_size=1, max_size=4))
async def test_the_others_are_read_as_without(redis: Redis, store: OperatorStore, make: Any, where: Any) -> None:
    await command(redis, "FLUSHALL")
    await endpoint(redis, make, GOOD)
    await endpoint(redis, make, BAD)
    expected = (await store.read({GOOD: [JOB]}))[GOOD]
    for key, (word, *arguments) in where:
        await command(redis, "DEL", key)
        await command(redis, word, key, *arguments)
    found = await store.read({BAD: [JOB], GOOD: [JOB]})
    assert found[GOOD] == expected
    if isinstance(found[BAD], Unreadable):
        assert KEYS.prefix in found[BAD].message
    assert (await store.read({BAD: [JOB]}))[BAD] is not None


@pytest.mark.parametrize(
    ("key", "words", "named"),
    [
        (KEYS.agents(), ("SET", b"x"), KEYS.agents()),
        (KEYS.incarnation(), ("RPUSH", b"x"), KEYS.incarnation()),
        (KEYS.adapters(), ("SADD", b"x"), KEYS.adapters()),
        (KEYS.jobs(), ("SET", b"x"), KEYS.jobs()),
    ],
)
async def test_an_index_of_another_type_is_named(
    redis: Redis, store: OperatorStore, make: Any, key: str, words: Any, named: str
) -> None:
    """Without it nobody knows whether an agent is lost."""
    await endpoint(redis, make, BAD)
    await command(redis, "DEL", key)
    await command(redis, words[0], key, *words[1:])
    found = (await store.read({BAD: [JOB]}))[BAD]
    assert isinstance(found, Unreadable)
    assert found.reason == "InvalidContent"
    assert found.message.startswith(f"key {named}: WRONGTYPE")


async def test_an_agent_that_is_no_agent_and_a_heartbeat_that_does_not_read_are_named(
    redis: Redis, store: OperatorStore, make: Any
) -> None:
    await endpoint(redis, make, BAD)
    await command(redis, "ZADD", KEYS.agents(), 1, "a:b")
    await command(redis, "ZADD", KEYS.agents(), 1, "uid-p2.b1")
    await command(redis, "SET", KEYS.agent("uid-p2.b1"), "x" * (reader.MESSAGE_BYTES + 1))
    found = (await store.read({BAD: [JOB]}))[BAD]
    assert isinstance(found, RedisView)
    assert len(found.agents) == 1
    told = [str(error) for error in found.broken]
    assert any("'a:b'" in each for each in told)
    assert any("uid-p2.b1" in each and "longer than" in each for each in told)


PAD = "x" * (reader.MESSAGE_BYTES - 1000)


@pytest.mark.parametrize(
    ("count", "beat", "told"),
    [
        (150, lambda make, pod: PAD, f"more than {bounded.ROUND_TRIP_BYTES} bytes together"),
        (40, lambda make, pod: make.heartbeat(pod).dumps()[:-1] + f', "new": "{PAD}"}}', "bytes together"),
        (3, lambda make, pod: f'["{PAD}"]', "bytes do not read, the last of them cs:"),
    ],
    ids=["more than is read", "more than is parsed", "more that does not read than is looked at"],
)
async def test_an_endpoint_that_says_too_much_is_not_looked_at_further(
    redis: Redis, store: OperatorStore, make: Any, count: int, beat: Any, told: str
) -> None:
    await endpoint(redis, make, GOOD)
    expected = (await store.read({GOOD: [JOB]}))[GOOD]
    for pod in (f"p{n}" for n in range(count)):
        await command(redis, "ZADD", KEYS.agents(), 1, make.agent_of(pod))
        await command(redis, "SET", KEYS.agent(make.agent_of(pod)), beat(make, pod))
    found = await store.read({BAD: [JOB], GOOD: [JOB], "third": []})
    assert found[GOOD] == expected
    assert isinstance(found["third"], RedisView)
    assert isinstance(found[BAD], Unreadable)
    assert told in found[BAD].message


async def test_as_much_as_is_allowed_is_read(redis: Redis, store: OperatorStore, make: Any) -> None:
    for pod in (f"p{n}" for n in range(30)):
        await command(redis, "ZADD", KEYS.agents(), 1, make.agent_of(pod))
        padded = make.heartbeat(pod).dumps()[:-1] + f', "new": "{PAD}"}}'
        await command(redis, "SET", KEYS.agent(make.agent_of(pod)), padded)
    found = (await store.read({BAD: [JOB]}))[BAD]
    assert isinstance(found, RedisView)
    assert len(found.agents) == 30


def resident_kb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


FILL = "for n = 1, ARGV[1] do redis.call(ARGV[2], KEYS[1], unpack(ARGV[2] == 'ZADD' and {1, n} or {n})) end"


@pytest.mark.parametrize("members", [200_000, pytest.param(10_000_000, marks=pytest.mark.nightly)])
async def test_memory_stays_where_it_is_whatever_is_there(
    redis: Redis, store: OperatorStore, make: Any, members: int
) -> None:
    """Strings of half a gigabyte, members of millions, one member that is huge."""
    await endpoint(redis, make, GOOD)
    await endpoint(redis, make, BAD)
    expected = (await store.read({GOOD: [JOB]}))[GOOD]
    before = resident_kb()
    for key in (KEYS.agent("uid-p1.b1"), KEYS.feed(JOB), KEYS.incarnation()):
        await command(redis, "DEL", key)
        await redis.setrange(key, (512 << 20) - 1, "x")  # takes longer than a command may, on a busy machine
        assert (await store.read({BAD: [JOB], GOOD: [JOB]}))[GOOD] == expected
        await command(redis, "DEL", key)
    for key, word in ((KEYS.agents(), "ZADD"), (KEYS.jobs(), "SADD")):
        await command(redis, "DEL", key)
        for start in range(0, members, 100_000):
            await redis.eval(FILL.replace("1, ARGV[1]", f"{start}, {start + 100_000}"), 1, key, 0, word)  # type: ignore[no-untyped-call]
        found = await store.read({BAD: [JOB], GOOD: [JOB]})
        assert found[GOOD] == expected
        assert isinstance(found[BAD], Unreadable)
        assert f"{key} has more than" in found[BAD].message
        await command(redis, "UNLINK", key)
    huge = bounded.REPLY_BYTES * 6
    await redis.eval("redis.call('ZADD', KEYS[1], 1, string.rep('x', ARGV[1]))", 1, KEYS.agents(), huge)  # type: ignore[no-untyped-call]
    found = await store.read({BAD: [JOB], GOOD: [JOB]})
    assert found[GOOD] == expected
    assert isinstance(found[BAD], Unreadable)
    assert "a reply of more than" in found[BAD].message
    await asyncio.sleep(0)
    assert resident_kb() - before < 50 << 10


async def test_what_is_as_it_was_is_not_parsed_anew_and_what_is_large_not_kept(
    redis: Redis, store: OperatorStore
) -> None:
    async def feed(status: FeedStatus) -> FeedStatus | None:
        await Store(redis, KEYS).set_feed(JOB, status)
        view = (await store.read({BAD: [JOB]}))[BAD]
        assert isinstance(view, RedisView)
        return view.jobs[JOB].feed

    first = await feed(FeedStatus(total_steps=10))
    assert await feed(FeedStatus(total_steps=10)) is first
    assert await feed(FeedStatus(total_steps=11)) == FeedStatus(total_steps=11)
    large = FeedStatus(notes=("x" * (reader.KEPT_BYTES // 8),) * 9)
    found = await feed(large)
    assert found == large
    assert await feed(large) is not found
