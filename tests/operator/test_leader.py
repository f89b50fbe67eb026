"""One replica leads; it ends before its Lease does, whatever call hangs; and each leadership has a greater token."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from kubernetes.aio.client import ApiClient, Configuration
from leases import LeaseServer, in_virtual_time, leap, now, replica

from coserve_operator.kube import SERVICE, Kube, Manifest
from coserve_operator.leader import (
    DURATION_S,
    RENEW_WITHIN_S,
    LeadershipLostError,
    NotLeadingError,
    may_take,
    observe,
)


def lease(uid: str = "l-0", holder: str = "", **spec: Any) -> Manifest:
    return {"metadata": {"uid": uid, "resourceVersion": "0"}, "spec": {"holderIdentity": holder} | spec}


def test_a_second_replica_begins_only_after_the_first_was_silent_for_the_leases_duration() -> None:
    async def scenario() -> None:
        server = LeaseServer()
        await replica(server, "a")[0].acquire()
        await replica(server, "b")[0].acquire()
        assert now() >= DURATION_S
        assert server.holder == "b"
        assert server.lease["spec"]["leaseTransitions"] == 2

    in_virtual_time(scenario)


def test_the_duration_that_counts_is_the_one_in_the_lease() -> None:
    """Another version may hold it for longer."""

    async def scenario() -> None:
        server = LeaseServer(lease(holder="a", renewTime="x", leaseDurationSeconds=60))
        await replica(server, "b")[0].acquire()
        assert now() >= 60

    in_virtual_time(scenario)


def test_a_lease_counts_from_when_we_saw_it_change_whatever_clock_wrote_it() -> None:
    held = lease(holder="b", renewTime="1970-01-01T00:00:00.000000Z")
    seen = observe(held, None, 100.0)
    assert not may_take(seen, "a", 100.0 + DURATION_S - 1)
    assert may_take(observe(held, seen, 200.0), "a", 200.0)


def test_a_released_lease_is_taken_at_once_and_who_released_it_writes_no_more() -> None:
    async def scenario() -> None:
        server = LeaseServer()
        first, _ = replica(server, "a")
        await first.acquire()
        await first.release()
        with pytest.raises(NotLeadingError):
            first.token()
        second, _ = replica(server, "b")
        await second.acquire()
        assert (now(), second.token()) == (0.0, 2)

    in_virtual_time(scenario)


FAULTS = [
    {"hangs": ("get",)},
    {"hangs": ("replace",)},
    {"hangs": ("replace",), "slow_s": 9.0},
    {"slow_s": 9.0},
    {"away": True},
    {"loses_answers": True, "hangs": ("get",)},
]


@pytest.mark.parametrize("faults", FAULTS, ids=str)
def test_leadership_ends_before_the_lease_does_whatever_hangs(faults: dict[str, Any]) -> None:
    async def scenario() -> None:
        server = LeaseServer()
        (first, access), (second, _) = replica(server, "a"), replica(server, "b")
        await first.acquire()
        begins = asyncio.create_task(second.acquire())
        leads = asyncio.create_task(first.hold())
        await asyncio.sleep(30)
        assert (first.token(), server.holder) == (1, "a")
        for name, value in faults.items():
            setattr(access, name, value)
        with pytest.raises(LeadershipLostError, match="could not be renewed"):
            await leads
        ended = now()
        with pytest.raises(NotLeadingError):
            first.token()
        assert server.holder == "a"
        await begins
        assert now() - ended >= DURATION_S - RENEW_WITHIN_S - 2.1  # what a replica that waits sees late
        assert now() > ended

    in_virtual_time(scenario)


def test_what_was_granted_counts_from_when_it_was_asked_for() -> None:
    async def scenario() -> None:
        leader, access = replica(LeaseServer(), "a")
        access.slow_s = 4.0
        await leader.acquire()  # asked at 4, answered at 8
        leap(5.9)
        assert leader.token() == 1
        leap(0.2)
        with pytest.raises(NotLeadingError):
            leader.token()

    in_virtual_time(scenario)


def test_a_process_that_stood_still_writes_nothing_more() -> None:
    """Before its loop comes to noticing that time has passed."""

    async def scenario() -> None:
        leader, _ = replica(LeaseServer(), "a")
        await leader.acquire()
        kube, service = Kube(None).guarded(leader.token), {"kind": "Service", "metadata": {"name": "x"}}  # type: ignore[arg-type]
        leap(RENEW_WITHIN_S)
        for call in (
            lambda: kube.create(service),
            lambda: kube.apply(service),
            lambda: kube.replace(service),
            lambda: kube.merge(SERVICE, "ns", "x", {}),
            lambda: kube.delete(SERVICE, "ns", "x"),
        ):
            with pytest.raises(NotLeadingError):
                await call()

    in_virtual_time(scenario)


def test_who_finds_another_name_in_the_lease_stops() -> None:
    async def scenario() -> None:
        server = LeaseServer()
        first, _ = replica(server, "a")
        await first.acquire()
        server.lease["spec"]["holderIdentity"] = "b"
        with pytest.raises(LeadershipLostError, match="b holds"):
            await first.hold()
        with pytest.raises(NotLeadingError):
            first.token()

    in_virtual_time(scenario)


def test_of_two_of_one_name_the_first_stops() -> None:
    """Host names need not be unique, and a container may begin again."""

    async def scenario() -> None:
        server = LeaseServer()
        (first, _), (second, _) = replica(server, "a"), replica(server, "a")
        await first.acquire()
        await second.acquire()
        assert (first.token(), second.token(), now()) == (1, 2, 0.0)
        with pytest.raises(NotLeadingError):
            await first.raise_above(2)
        with pytest.raises(LeadershipLostError, match="another of our name"):
            await first.hold()
        assert server.token == 2

    in_virtual_time(scenario)


# ---- tokens ----


def test_the_token_goes_on_from_the_leases_and_renewing_keeps_it() -> None:
    async def scenario() -> None:
        server = LeaseServer()
        server.lease["metadata"]["annotations"] = {"coserve.dev/fencing-token": "41", "other": "x"}
        leader, _ = replica(server, "a")
        await leader.acquire()
        holds = asyncio.create_task(leader.hold())
        await asyncio.sleep(60)
        holds.cancel()
        assert (leader.token(), server.token) == (42, 42)
        assert server.lease["metadata"]["annotations"]["other"] == "x"

    in_virtual_time(scenario)


@pytest.mark.parametrize("text", ["", "x", "-5", "1.5", "²"])
def test_an_annotation_that_is_no_number_counts_as_none(text: str) -> None:
    async def scenario() -> None:
        server = LeaseServer()
        server.lease["metadata"]["annotations"] = {"coserve.dev/fencing-token": text}
        leader, _ = replica(server, "a")
        await leader.acquire()
        assert leader.token() == 1

    in_virtual_time(scenario)


def test_a_greater_token_stands_in_the_lease_before_it_is_used() -> None:
    async def scenario() -> None:
        server = LeaseServer()
        leader, access = replica(server, "a")
        await leader.acquire()
        await asyncio.gather(leader.raise_above(7), leader.raise_above(5), leader.raise_above(7))
        assert (leader.token(), server.token) == (8, 8)
        access.away = True
        with pytest.raises(NotLeadingError, match="in time"):
            await leader.raise_above(9)
        assert server.token == 8

    in_virtual_time(scenario)


def test_an_answer_that_was_lost_is_not_taken_for_anothers_write() -> None:
    async def scenario() -> None:
        server = LeaseServer()
        leader, access = replica(server, "a")
        await leader.acquire()
        access.loses_answers = True
        raising = asyncio.create_task(leader.raise_above(7))
        await asyncio.sleep(1)
        assert (leader.token(), server.token) == (1, 8)
        access.loses_answers = False
        await raising
        assert leader.token() == server.token >= 8

    in_virtual_time(scenario)


def test_who_lost_the_lease_takes_no_greater_token() -> None:
    async def scenario() -> None:
        server = LeaseServer()
        first, _ = replica(server, "a")
        await first.acquire()
        server.lease["spec"]["holderIdentity"] = "b"
        with pytest.raises(NotLeadingError, match="b holds"):
            await first.raise_above(7)
        assert server.token == 1

    in_virtual_time(scenario)


# ---- a Lease that is deleted ----


def test_a_leader_whose_lease_is_deleted_goes_on_under_its_token() -> None:
    async def scenario() -> None:
        server = LeaseServer()
        leader, _ = replica(server, "a")
        await leader.acquire()
        await leader.raise_above(6)
        holds = asyncio.create_task(leader.hold())
        await asyncio.sleep(5)
        server.lease = None
        await asyncio.sleep(30)
        assert not holds.done()
        assert (server.holder, server.token, leader.token()) == ("a", 7, 7)
        holds.cancel()

    in_virtual_time(scenario)


@pytest.mark.parametrize("remade_by", ["the one that waits", "one that has just begun", "somebody else"])
def test_a_deleted_lease_gives_nobody_the_leadership_of_one_that_is_cut_off(remade_by: str) -> None:
    async def scenario() -> None:
        server = LeaseServer()
        (first, access), (second, _) = replica(server, "a"), replica(server, "b")
        await first.acquire()
        leads = asyncio.create_task(first.hold())
        begins = None if remade_by == "one that has just begun" else asyncio.create_task(second.acquire())
        await asyncio.sleep(6)
        access.away = True
        server.lease = None if remade_by != "somebody else" else lease("another")
        begins = begins or asyncio.create_task(second.acquire())
        with pytest.raises(LeadershipLostError):
            await leads
        assert not begins.done()
        await begins
        assert server.holder == "b"

    in_virtual_time(scenario)


# ---- the real client ----


async def test_a_renewal_that_is_never_answered_is_cut_off(servers: Any) -> None:
    """By the deadline, not by the client's own time."""
    over = asyncio.Event()

    async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()  # until the client gives up
        writer.close()
        over.set()

    port = servers.free_port()
    server = await asyncio.start_server(never, "127.0.0.1", port)
    kube = Kube(ApiClient(Configuration(host=f"http://127.0.0.1:{port}")))
    try:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await kube.replace({"kind": "Lease", "metadata": {"namespace": "ns", "name": "l"}})
        await over.wait()
    finally:
        await kube.close()
        server.close()
        await server.wait_closed()
