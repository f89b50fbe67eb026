"""Which waiting job goes to which agent: first come, first served, to the least loaded agent with room."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from coserve_api.messages import Heartbeat


@dataclass(frozen=True, slots=True)
class Waiting:
    """A job without an agent; `created` orders the queue (creation time, in whole seconds, then name)."""

    uid: str
    created: tuple[str, str]


def capacity(agents: Mapping[str, Heartbeat], bound: Mapping[str, str], leaving: Set[str]) -> dict[str, int]:
    """Return how many more jobs each agent takes.

    `bound` maps job uids to agent ids. A job counts where it is bound and also where it still runs, so that an agent
    that has not yet let go of one job gets no other. Agents that are not ready, drain or are to go take none.
    """
    free: dict[str, int] = {}
    for agent, beat in agents.items():
        if beat.ready and not beat.draining and agent not in leaving:
            held = {job for job, holder in bound.items() if holder == agent} | set(beat.jobs)
            free[agent] = max(0, beat.max_jobs - len(held))
    return free


def place(
    waiting: Sequence[Waiting], agents: Mapping[str, Heartbeat], bound: Mapping[str, str], leaving: Set[str]
) -> dict[str, str]:
    """Return job uid -> agent id for the jobs that get an agent now."""
    free = capacity(agents, bound, leaving)
    placed: dict[str, str] = {}
    for job in sorted(waiting, key=lambda each: each.created):
        candidates = [agent for agent, room in free.items() if room > 0]
        if not candidates:
            break
        chosen = min(
            candidates,
            key=lambda agent: (agents[agent].max_jobs - free[agent], agents[agent].load.saturation_percent, agent),
        )
        free[chosen] -= 1
        placed[job.uid] = chosen
    return placed
