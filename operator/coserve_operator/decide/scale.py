"""Scaling down one agent at a time: choose a victim, have its jobs given back, mark it, then lower the Deployment."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coserve_operator.decide.observed import PodView

RELEASE_LIMIT_S = 30.0
"""How long a victim may take to checkpoint and give its jobs back before it is removed all the same."""


@dataclass(frozen=True, slots=True)
class Held:
    """A job that a pod holds: how many steps would have to be done again without a checkpoint now."""

    job_uid: str
    unsaved_steps: int


@dataclass(frozen=True, slots=True)
class ScalePlan:
    """What to do now: `replicas` is for the Deployment; pods in `mark` and `unmark` are annotated before that."""

    replicas: int
    leaving: frozenset[str] = frozenset()
    mark: tuple[str, ...] = ()
    unmark: tuple[str, ...] = ()
    requeue_after_s: float | None = None


def plan_scale(
    desired: int, current: int | None, pods: Sequence[PodView], held: Mapping[str, Sequence[Held]], now: float
) -> ScalePlan:
    """Return the next step from `current` Deployment replicas (None: there is no Deployment) to `desired`.

    `held` maps pod names to the jobs bound there; `leaving` in the plan names the pods that must get no new job.
    """
    live = [pod for pod in pods if not pod.deleting]
    marked = tuple(sorted(pod.name for pod in live if pod.leaving_since is not None))
    if current is None or (desired >= current and len(live) <= desired):
        return ScalePlan(desired, unmark=marked)
    if desired >= current:  # lowered, but the ReplicaSet has yet to choose: the marks must still be there
        return ScalePlan(desired, frozenset(marked), requeue_after_s=1.0)
    if len(live) > current:  # the ReplicaSet has not taken the last victim yet
        return ScalePlan(current, frozenset(marked), requeue_after_s=1.0)
    if len(live) < current:  # pods that do not exist yet, or were taken from us, hold nothing
        return ScalePlan(max(desired, len(live)), frozenset(marked), requeue_after_s=1.0)
    if not marked:
        victim = min(live, key=lambda pod: _worth(pod, held.get(pod.name, ())))
        free = not held.get(victim.name)
        lower = current - 1 if free else current
        return ScalePlan(lower, frozenset({victim.name}), mark=(victim.name,), requeue_after_s=1.0)
    victim = min((pod for pod in live if pod.name in marked), key=lambda pod: pod.leaving_since or 0.0)
    waited = now - (victim.leaving_since or 0.0)
    if held.get(victim.name) and waited < RELEASE_LIMIT_S:
        return ScalePlan(current, frozenset(marked), requeue_after_s=min(1.0, RELEASE_LIMIT_S - waited))
    return ScalePlan(current - 1, frozenset(marked), requeue_after_s=1.0)


def _worth(pod: PodView, held: Sequence[Held]) -> tuple[bool, bool, int, int, str]:
    """Return what is lost with a pod. A ReplicaSet takes starting pods first whatever they cost, and so must we."""
    return (pod.scheduled, pod.ready, len(held), sum(job.unsaved_steps for job in held), pod.name)
