"""Properties of the fence under any order of events, and proof that the properties can fail.

Two agents do whatever they like, as if paused and woken at any moment, with epochs older and newer than the current
one; the operator binds and unbinds; leases run out; Redis is emptied. A small model says which writes are right.
"""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from backends import local_world
from hypothesis import given, settings
from hypothesis import strategies as st

from coserve_contract import lua
from coserve_contract.connect import command
from coserve_contract.local.fencing import LocalFencing
from coserve_contract.scripts import Lease, Reason

JOB = "job-1"
WRITES = ("checkpoint", "progress", "renew")
# (what, who, the epoch counted from the one in status); "holder" is whom status names, the other agents may be stale
REGISTER = [("register", agent, 0) for agent in "ab"]
USUAL = [
    *[[("bind", agent, 1), ("take", "holder", 0)] for agent in "ab"],
    *[[(write, "holder", 0)] for write in WRITES],
    [("expire", "a", 0), ("take", "holder", 0)],
    [("empty", "a", 0), ("restore", "a", 0), *REGISTER, ("take", "holder", 0)],
]
KINDS = ("bind", "unbind", "take", *WRITES)
ODD = [
    *[[(what, agent, around)] for what in KINDS for agent in "ab" for around in (-1, 0, 1, 2)],
    *[[(what, "a", 0)] for what in ("expire", "empty", "restore") for _ in "123"],
    *[[each] for each in REGISTER for _ in "123"],
]
FRAGMENTS = st.one_of(st.sampled_from(USUAL), st.sampled_from(ODD))
HISTORIES = st.lists(FRAGMENTS, min_size=15, max_size=60).map(lambda parts: [event for part in parts for event in part])


@dataclass
class Model:
    """What must be true. `status` is the binding that the operator wrote into the custom resource before it bound."""

    fence: tuple[int, str] | None = None
    lease: tuple[int, str] | None = None
    status: tuple[int, str] = (0, "")
    incarnation: str = ""
    known: dict[str, str] = field(default_factory=dict)
    accepted: list[int] = field(default_factory=list)

    def may_take(self, agent: str, epoch: int) -> bool:
        return self.fence == (epoch, agent) and self.incarnation != "" and self.known[agent] == self.incarnation

    def may_write(self, agent: str, epoch: int) -> bool:
        return self.may_take(agent, epoch) and self.lease == (epoch, agent)


async def play(world, messages, events, *, careful: bool) -> Model:
    """Send `events` to Redis and to the model; they must agree. A `careful` operator binds above status only."""
    model, agents = Model(incarnation="start", known={"a": "start", "b": "start"}), {"a": world.a, "b": world.b}
    await world.start("start")
    for step, (event, agent, around) in enumerate(events):
        agent = (model.status[1] or "a") if agent == "holder" else agent  # noqa: PLW2901
        actor, epoch = agents[agent], max(1, model.status[0] + around)
        match event:
            case "bind":
                if careful and epoch <= model.status[0]:
                    continue
                done = await world.binder.bind(JOB, actor.agent, messages.binding(epoch)) is None
                assert done == (model.fence is None or epoch > model.fence[0])
                if done:
                    model.fence, model.lease, model.status = (epoch, agent), None, (epoch, agent)
            case "unbind":
                done = await world.binder.unbind(JOB, actor.agent, epoch) is None
                assert done == (model.fence in ((epoch, agent), (epoch, "")))
                if done:
                    model.fence, model.lease, model.status = (epoch, ""), None, (epoch, "")
            case "take":
                done = isinstance(await actor.take_lease(JOB, epoch), Lease)
                assert done == model.may_take(agent, epoch)
                if done:
                    model.lease = (epoch, agent)
            case "renew":
                assert (await actor.renew_lease(JOB, epoch) is None) == model.may_write(agent, epoch)
            case "progress" | "checkpoint":
                if event == "progress":
                    refused = await actor.report_progress(JOB, messages.progress(epoch, step))
                else:
                    refused = await actor.accept_checkpoint(JOB, epoch, messages.checkpoint(step, epoch))
                assert (refused is None) == model.may_write(agent, epoch), refused
                if refused is None:
                    model.accepted.append(epoch)
            case "register":
                actor.register(await world.store.incarnation() or "")
                model.known[agent] = model.incarnation
            case "expire":
                await world.expire(JOB)
                model.lease = None
            case "restart":  # a server that begins anew says so, and has to be known again
                model.incarnation = str(step)
                await world.store.set_incarnation(model.incarnation)
            case "empty":
                await command(world.redis, "FLUSHALL")
                model.fence, model.lease, model.incarnation = None, None, ""
            case "restore" if model.incarnation == "":  # the operator binds what status says, then writes a new one
                if model.fence is None and model.status[1]:
                    holder = agents[model.status[1]].agent
                    assert await world.binder.bind(JOB, holder, messages.binding(model.status[0])) is None
                    model.fence = model.status
                model.incarnation = str(step)
                await world.store.set_incarnation(model.incarnation)
    return model


def run(make_world, redis_server, messages, events, *, careful: bool = True) -> Model:
    async def scenario() -> Model:
        redis = redis_server.connect()
        try:
            await command(redis, "FLUSHALL")
            return await play(make_world(redis), messages, events, careful=careful)
        finally:
            await redis.aclose()

    with asyncio.Runner() as runner:
        return runner.run(scenario())


def run_local(messages, events) -> Model:
    """The same in a directory, which nobody empties: what begins anew there is the server."""
    restarted = [("restart" if what == "empty" else what, agent, around) for what, agent, around in events]

    async def scenario() -> Model:
        with tempfile.TemporaryDirectory() as folder:
            world = local_world(Path(folder))
            try:
                return await play(world, messages, restarted, careful=False)
            finally:
                await world.database.close()

    with asyncio.Runner() as runner:
        return runner.run(scenario())


SETTINGS = settings(max_examples=150)


def test_redis_accepts_exactly_what_the_model_allows(make_world, redis_server, messages) -> None:
    seen = []

    @SETTINGS
    @given(events=HISTORIES)
    def histories(events) -> None:
        seen.append(run(make_world, redis_server, messages, events, careful=False).accepted)

    histories()
    assert sum(map(bool, seen)) > len(seen) / 4, "most histories never get to write: they prove little"


def test_a_directory_accepts_exactly_what_the_model_allows(messages) -> None:
    seen = []

    @SETTINGS
    @given(events=HISTORIES)
    def histories(events) -> None:
        seen.append(run_local(messages, events).accepted)

    histories()
    assert sum(map(bool, seen)) > len(seen) / 4, "most histories never get to write: they prove little"


def test_no_older_epoch_is_accepted_after_a_newer_one_even_if_redis_is_emptied(
    make_world, redis_server, messages
) -> None:
    seen = []

    @SETTINGS
    @given(events=HISTORIES)
    def histories(events) -> None:
        accepted = run(make_world, redis_server, messages, events).accepted
        assert accepted == sorted(accepted)
        seen.append(set(accepted))

    histories()
    assert sum(len(epochs) > 1 for epochs in seen) > len(seen) / 10, "few histories write under several epochs"


STALE = [
    ("bind", "a", 1),
    ("take", "a", 0),
    ("bind", "b", 1),
    ("take", "b", 0),
    ("checkpoint", "b", 0),
    ("expire", "b", 0),
    ("take", "a", -1),
    ("checkpoint", "a", -1),
]


def test_a_stale_agent_cannot_come_back_after_the_lease_ran_out(make_world, redis_server, messages) -> None:
    assert run(make_world, redis_server, messages, STALE).accepted == [2]


def without(script: str, check: str) -> str:
    """The script with one check taken out, to see that the tests would notice."""
    kept = [line for line in script.splitlines() if f"refused('{check}'" not in line]
    assert len(kept) < len(script.splitlines())
    return "\n".join(kept)


def test_a_missing_epoch_check_is_noticed(make_world, redis_server, messages, monkeypatch) -> None:
    monkeypatch.setattr(lua, "TAKE_LEASE", without(without(lua.TAKE_LEASE, "stale_epoch"), "not_owner"))
    with pytest.raises(AssertionError):
        run(make_world, redis_server, messages, STALE)


def test_a_missing_lease_check_is_noticed(make_world, redis_server, messages, monkeypatch) -> None:
    monkeypatch.setattr(lua, "ACCEPT_CHECKPOINT", without(lua.ACCEPT_CHECKPOINT, "lost_lease"))
    with pytest.raises(AssertionError):
        run(make_world, redis_server, messages, [("bind", "a", 1), ("checkpoint", "a", 0)])


@pytest.mark.parametrize("check", ["epoch", "owner"])
def test_a_check_that_a_directory_lacks_is_noticed(messages, monkeypatch, check) -> None:
    refused = LocalFencing._refused
    missing = {"epoch": (Reason.STALE_EPOCH, Reason.NOT_OWNER), "owner": (Reason.LOST_LEASE,)}[check]

    def lax(self, *arguments, **more):
        why = refused(self, *arguments, **more)
        return None if why is not None and why.reason in missing else why

    monkeypatch.setattr(LocalFencing, "_refused", lax)
    with pytest.raises(AssertionError):
        run_local(messages, STALE if check == "epoch" else [("bind", "a", 1), ("checkpoint", "a", 0)])


def test_a_missing_incarnation_check_is_noticed(make_world, redis_server, messages, monkeypatch) -> None:
    monkeypatch.setattr(lua, "TAKE_LEASE", without(lua.TAKE_LEASE, "incarnation"))
    with pytest.raises(AssertionError):
        history = [("bind", "a", 1), ("empty", "a", 0), ("restore", "a", 0), ("take", "a", 0)]
        run(make_world, redis_server, messages, history)


def test_an_operator_that_forgets_the_epoch_in_status_is_noticed(make_world, redis_server, messages) -> None:
    history = [("bind", "a", 2), ("take", "a", 0), ("progress", "a", 0), ("empty", "a", 0), ("bind", "a", -1)]
    history += [("restore", "a", 0), ("register", "a", 0), ("take", "a", 0), ("progress", "a", 0)]
    accepted = run(make_world, redis_server, messages, history, careful=False).accepted
    assert accepted == [2, 1]
    assert run(make_world, redis_server, messages, history).accepted == [2, 2]
