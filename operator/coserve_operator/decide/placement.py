"""Which waiting job goes to which agent: first come, first served, to the least loaded agent with room."""

import heapq
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from coserve_api.job import FinetuneJob
from coserve_contract.messages import Heartbeat


@dataclass(frozen=True, slots=True)
class Waiting:
    """A job without an agent; `created` orders the queue."""

    uid: str
    created: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Bound:
    """A job that an agent has."""

    uid: str
    priority: int
    created: tuple[str, str]


def created(job: FinetuneJob) -> tuple[str, str]:
    """Return what orders the queue: creation time, in whole seconds, then name."""
    return job.metadata.creation_timestamp or "", job.metadata.name


def capacity(agents: Mapping[str, Heartbeat], bound: Mapping[str, str], leaving: Set[str], most: int) -> dict[str, int]:
    """Return how many more jobs each agent takes, of `most` at once.

    `bound` maps job uids to agent ids. A job counts where it is bound and also where it still runs, so that an agent
    that has not yet let go of one job gets no other. Agents that are not ready, drain or are to go take none.
    """
    held: dict[str, set[str]] = {agent: set(beat.jobs) for agent, beat in agents.items()}
    for job, holder in bound.items():
        held.setdefault(holder, set()).add(job)
    free: dict[str, int] = {}
    for agent, beat in agents.items():
        if beat.ready and not beat.draining and agent not in leaving:
            free[agent] = max(0, min(most, beat.max_jobs) - len(held[agent]))
    return free


def surplus(held: Mapping[str, Sequence[Bound]], most: int) -> frozenset[str]:
    """Return the uids of the jobs that agents give back, since they may run only `most` at once: of lower priority
    first, then the younger.
    """
    return frozenset(
        job.uid
        for jobs in held.values()
        for job in sorted(jobs, key=lambda each: (-each.priority, each.created))[most:]
    )


def place(
    waiting: Sequence[Waiting], agents: Mapping[str, Heartbeat], bound: Mapping[str, str], leaving: Set[str], most: int
) -> dict[str, str]:
    """Return job uid -> agent id for the jobs that get an agent now; an agent runs `most` at once."""
    free = capacity(agents, bound, leaving, most)
    least_loaded = [(_load(agents[agent], room), agent) for agent, room in free.items() if room > 0]
    heapq.heapify(least_loaded)
    placed: dict[str, str] = {}
    for job in sorted(waiting, key=lambda each: each.created):
        if not least_loaded:
            break
        agent = least_loaded[0][1]
        placed[job.uid] = agent
        free[agent] -= 1
        if free[agent] > 0:
            heapq.heapreplace(least_loaded, (_load(agents[agent], free[agent]), agent))
        else:
            heapq.heappop(least_loaded)
    return placed


def _load(beat: Heartbeat, room: int) -> tuple[int, float]:
    return beat.max_jobs - room, beat.load.saturation_percent
