"""The queue: due keys in order, never one key twice at once, longer waits after failures."""

from __future__ import annotations

import asyncio
import math
import random

from hypothesis import given
from hypothesis import strategies as st

from coserve_operator.queue import IN_A_ROW, BackOff, KeyedQueue, Lane, Schedule


def test_a_key_comes_when_it_is_due() -> None:
    schedule: Schedule[str] = Schedule()
    schedule.add("b", 2.0)
    schedule.add("a", 1.0)
    assert schedule.pop(0.5) is None
    assert schedule.next_due() == 1.0
    assert [schedule.pop(3.0), schedule.pop(3.0), schedule.pop(3.0)] == ["a", "b", None]


def test_the_earlier_of_two_requests_stands() -> None:
    schedule: Schedule[str] = Schedule()
    schedule.add("a", 5.0)
    schedule.add("a", 1.0)
    schedule.add("a", 3.0)
    assert schedule.pop(1.0) == "a"
    schedule.done("a")
    assert schedule.pop(9.0) is None


def test_a_key_in_work_waits_until_it_is_done() -> None:
    schedule: Schedule[str] = Schedule()
    schedule.add("a", 0.0)
    assert schedule.pop(0.0) == "a"
    schedule.add("a", 0.0)
    assert schedule.pop(1.0) is None
    assert schedule.next_due() is None
    schedule.done("a")
    assert schedule.pop(1.0) == "a"


def test_what_was_changed_comes_before_what_is_merely_due() -> None:
    schedule: Schedule[str] = Schedule()
    for n in range(9):
        schedule.add(f"listed-{n}", 0.0)
    schedule.hurry("b", Lane.ASKED)
    schedule.hurry("a", Lane.ASKED)
    assert schedule.next_due() == -math.inf
    assert [schedule.pop(1.0) for _ in range(3)] == ["b", "a", "listed-0"]


def test_what_somebody_asked_for_comes_before_what_happened() -> None:
    schedule: Schedule[str] = Schedule()
    schedule.hurry("happened", Lane.HAPPENED)
    schedule.hurry("asked", Lane.ASKED)
    schedule.hurry("both", Lane.HAPPENED)
    schedule.hurry("both", Lane.ASKED)
    assert [schedule.pop(1.0) for _ in range(4)] == ["asked", "both", "happened", None]


def test_an_urgent_key_stands_for_what_was_due_too() -> None:
    schedule: Schedule[str] = Schedule()
    schedule.add("a", 0.0)
    schedule.hurry("a", Lane.ASKED)
    assert len(schedule) == 1
    assert [schedule.pop(1.0), schedule.pop(1.0)] == ["a", None]
    schedule.hurry("a", Lane.ASKED)  # in work
    assert schedule.pop(1.0) is None
    assert schedule.next_due() is None
    schedule.done("a")
    assert schedule.pop(1.0) == "a"


def test_changes_without_end_starve_nothing() -> None:
    schedule: Schedule[str] = Schedule()
    schedule.add("due", 0.0)
    came = []
    for n in range(2 * IN_A_ROW):
        schedule.hurry(f"changed-{n}", Lane.ASKED)
        schedule.hurry(f"changed-too-{n}", Lane.HAPPENED)
        came.append(schedule.pop(1.0))
    assert came.index("due") == IN_A_ROW


@given(
    st.lists(
        st.tuples(st.sampled_from(["add", "hurry", "pop", "done"]), st.sampled_from("abc"), st.integers(0, 9)),
        max_size=60,
    )
)
def test_no_key_is_ever_in_work_twice_and_none_is_forgotten(steps: list[tuple[str, str, int]]) -> None:
    schedule: Schedule[str] = Schedule()
    working: set[str] = set()
    wanted: set[str] = set()
    for now, (what, key, delay) in enumerate(steps):
        if what == "add":
            schedule.add(key, now + delay)
            wanted.add(key)
        elif what == "hurry":
            schedule.hurry(key, Lane(delay % 2))
            wanted.add(key)
        elif what == "done" and key in working:
            working.remove(key)
            schedule.done(key)
        elif what == "pop" and (got := schedule.pop(now)) is not None:
            assert got not in working
            working.add(got)
            wanted.remove(got)
    for key in list(working):
        schedule.done(key)
    rest = set()
    while (got := schedule.pop(10_000)) is not None:
        rest.add(got)
    assert rest == wanted


def test_delays_double_spread_and_end_with_success() -> None:
    backoff: BackOff[str] = BackOff(random.Random(1), first_s=1.0, most_s=8.0)
    delays = [backoff.failed("a") for _ in range(6)]
    for delay, nominal in zip(delays, [1, 2, 4, 8, 8, 8], strict=True):
        assert 0.5 * nominal <= delay <= 1.5 * nominal
    assert delays[3] != delays[4]
    backoff.succeeded("a")
    assert backoff.failed("a") <= 1.5


async def test_get_waits_by_the_clock_and_wakes_for_news() -> None:
    clock = [0.0]
    queue: KeyedQueue[str] = KeyedQueue(lambda: clock[0], BackOff(random.Random(1)))
    queue.add("late", 100.0)
    got = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    assert not got.done()
    queue.add("now")
    assert await got == "now"
    assert 0.25 <= queue.failed("now") <= 0.75
    clock[0] = 1.0
    assert await queue.get() == "now"
    queue.done("now", requeue_after_s=5.0)
    clock[0] = 200.0
    assert {await queue.get(), await queue.get()} == {"now", "late"}
