"""Who runs and who is fed, whatever waits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from standalone_jobs import job

from coserve_agent.standalone.queue import Waiting, places

WAITING = st.lists(
    st.builds(
        lambda priority, created, ready, waits: (priority, created, ready, waits),
        st.integers(-4, 4),
        st.integers(0, 9),
        st.booleans(),
        st.booleans(),
    ),
    max_size=12,
).map(
    lambda rows: [
        Waiting(job(str(n), {"priority": priority}, created_s=float(created)), ready, waits)
        for n, (priority, created, ready, waits) in enumerate(rows)
    ]
)


@given(WAITING, st.integers(0, 3), st.integers(0, 3))
def test_places_are_given_by_priority_and_age_and_never_more_than_there_are(
    waiting: list[Waiting], running: int, most: int
) -> None:
    found = places(waiting, running, most)
    by_uid = {one.job.uid: one for one in waiting}
    free = max(0, most - running)
    assert len(found.begin) <= free
    assert len(found.fed) <= (free + 1 if most else 0)
    assert set(found.begin) <= set(found.fed)
    assert all(by_uid[uid].ready and not by_uid[uid].waits for uid in found.begin)
    assert sorted((*found.begin, *found.queue)) == sorted(by_uid)

    def rank(uid: str) -> tuple[int, float]:
        return -by_uid[uid].job.spec.priority, by_uid[uid].job.created_s

    able = [uid for uid in by_uid if not by_uid[uid].waits]
    left = [uid for uid in able if uid not in found.fed]
    assert all(rank(fed) <= rank(uid) for fed in found.fed for uid in left)
    assert [rank(uid) for uid in found.queue] == sorted(rank(uid) for uid in found.queue)


def test_a_job_whose_data_are_not_ready_holds_no_place() -> None:
    found = places([Waiting(job("a")), Waiting(job("b"), ready=True)], 0, 1)
    assert (found.begin, found.fed, found.queue) == (("uid-b",), ("uid-a", "uid-b"), ("uid-a",))
