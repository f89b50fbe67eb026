"""Feeders: a Kubernetes Job for each FinetuneJob that runs or is next, and a bounded number in the whole cluster that
check the data of others.
"""

from datetime import datetime
from typing import Any

from coserve_api.endpoint import InferenceEndpoint
from coserve_api.job import FinetuneJob
from coserve_operator.apply.hindrances import ForeignObjectError
from coserve_operator.apply.listener import Listener
from coserve_operator.decide.actions import FeederAction
from coserve_operator.decide.decision import Decision, ObservedJob
from coserve_operator.decide.observed import FeederView, Obstacle
from coserve_operator.decide.obstacles import foreign
from coserve_operator.kube import BATCH_JOB, ConflictError, Kube, Manifest, NotFoundError
from coserve_operator.manifests.defaults import with_pod_defaults
from coserve_operator.manifests.feeder import feeder, feeder_name
from coserve_operator.manifests.metadata import is_leaving, is_owned_by, secret_name
from coserve_operator.redis.stores import Stores
from coserve_operator.settings import Settings
from coserve_operator.watch.cache import Cache

ASK_AGAIN_S, MOST_S = 2.0, 60.0
"""Jobs that wait for a check ask together about as often as there are checks at once in so many seconds."""


class FeederApplier:
    """Carries out what a decision wishes for the feeder."""

    def __init__(self, settings: Settings, kube: Kube, stores: Stores, cache: Cache) -> None:
        self._settings = settings
        self._kube = kube
        self._stores = stores
        self._cache = cache
        self._listener = Listener(kube)
        self._making: set[str] = set()
        """Uids of jobs whose check is being made."""
        self._refused: set[str] = set()
        """Uids of jobs for whose check there was no room."""

    def secret(self, endpoint: InferenceEndpoint) -> str:
        """Return the name of the Secret that a feeder is to have."""
        access = self._stores.access(endpoint.metadata.namespace, endpoint.metadata.uid)
        return secret_name(endpoint.metadata.name, access)

    @staticmethod
    def owns(job: FinetuneJob, found: Manifest) -> bool:
        """Return whether the Job found belongs to this FinetuneJob, and not to an earlier one of the same name."""
        return is_owned_by(found, job.metadata.uid) and found["metadata"].get("deletionTimestamp") is None

    async def act(self, observed: ObservedJob, decision: Decision, found: Manifest | None) -> float | None:
        """Create, pause, resume, replace or remove the feeder; return in how many seconds to try again what there is
        no room for.

        ForeignObjectError: a Job of its name exists that is somebody else's.
        """
        job, action, known = observed.job, decision.feeder, observed.feeder
        namespace, name = job.metadata.namespace, feeder_name(job.metadata.name)
        check = action is FeederAction.CHECK
        if not check:
            self._refused.discard(job.metadata.uid)
        if found is not None and known is None and found["metadata"]["name"] == name:
            raise _foreign(found)
        if action in (FeederAction.RENEW, FeederAction.REMOVE) and known is not None:
            await self._kube.delete(BATCH_JOB, namespace, name, known.uid)
        elif action is FeederAction.SUSPEND and known is not None and not (known.suspended or known.finished):
            await self._pause(namespace, name, True)
        elif action not in (FeederAction.RUN, FeederAction.CHECK) or (known is not None and not known.suspended):
            return None
        elif check and not self._has_room(job.metadata.uid):
            return min(MOST_S, ASK_AGAIN_S * (1 + len(self._refused) / self._settings.checks))
        else:
            await self._begin(observed, check)
        return None

    def _has_room(self, uid: str) -> bool:
        """Return whether another check may begin in the cluster."""
        if self._cache.checking() + len(self._making) >= self._settings.checks:
            self._refused.add(uid)
            return False
        self._refused.discard(uid)
        return True

    async def _begin(self, observed: ObservedJob, check: bool) -> None:
        """Make the feeder, or let it go on; a check counts from now on, also before a watch tells of it."""
        job, endpoint = observed.job, observed.endpoint
        if check:
            self._making.add(job.metadata.uid)
        try:
            if observed.feeder is not None:
                await self._pause(job.metadata.namespace, feeder_name(job.metadata.name), False)
            elif endpoint is not None:
                access = self._stores.access(endpoint.metadata.namespace, endpoint.metadata.uid)
                manifest = feeder(job, endpoint, self._settings.agent_image, access, check)
                manifest = with_pod_defaults(manifest, self._settings.pod_defaults)
                self._cache.put(BATCH_JOB, await self._kube.create(manifest))
        except ConflictError:
            there = await self._kube.get(BATCH_JOB, job.metadata.namespace, feeder_name(job.metadata.name))
            if not is_owned_by(there, job.metadata.uid):
                raise _foreign(there) from None
        finally:
            self._making.discard(job.metadata.uid)

    async def listen(self, job: FinetuneJob, feeder: FeederView, now: datetime) -> Obstacle | None:
        """Return what keeps a feeder from starting, where that is told by events alone."""
        if feeder.podless:
            return await self._listener.of_pods_of(job.metadata.namespace, feeder.uid, now)
        if feeder.creating is None:
            return None
        said = await self._listener.of_pod(job.metadata.namespace, feeder.creating, now)
        return None if said is None else Obstacle(*said)

    async def stop(self, job_uid: str, left: Manifest) -> None:
        """Pause the feeder that a job has left."""
        if is_owned_by(left, job_uid):
            await self._pause(left["metadata"]["namespace"], left["metadata"]["name"], True)

    async def _pause(self, namespace: str, name: str, pause: bool) -> None:
        patch: dict[str, Any] = {"spec": {"suspend": pause}}
        try:
            self._cache.put(BATCH_JOB, await self._kube.merge(BATCH_JOB, namespace, name, patch))
        except NotFoundError:
            return


def _foreign(found: Manifest) -> ForeignObjectError:
    """Return the obstacle of a Job that is not ours; the deletion of an earlier job's feeder wakes us."""
    leaving = is_leaving(found)
    return ForeignObjectError(foreign("Job", found["metadata"]["name"], "this job's feeder", leaving=leaving))
