"""Feeders: one Kubernetes Job for each living FinetuneJob, paused with it, and made anew when Redis lost its work."""

from typing import Any

from coserve_api.job import FinetuneJob
from coserve_operator.kube import BATCH_JOB, ConflictError, Kube, Manifest, NotFoundError
from coserve_operator.reconcile.job import FeederWish, Sight, Verdict
from coserve_operator.resources.feeder import feeder, feeder_name
from coserve_operator.resources.metadata import is_owned_by
from coserve_operator.settings import Settings


class FeederKeeper:
    """Carries out what a verdict wishes for the feeder."""

    def __init__(self, settings: Settings, kube: Kube) -> None:
        self._settings = settings
        self._kube = kube

    @staticmethod
    def owns(job: FinetuneJob, found: Manifest) -> bool:
        """Return whether the Job found belongs to this FinetuneJob, and not to an earlier one of the same name."""
        return is_owned_by(found, job.metadata.uid) and found["metadata"].get("deletionTimestamp") is None

    async def act(self, sight: Sight, verdict: Verdict, found: Manifest | None) -> None:
        """Create, pause, resume or replace the feeder."""
        job, endpoint = sight.job, sight.endpoint
        namespace, name = job.metadata.namespace, feeder_name(job.metadata.name)
        known = sight.feeder
        if found is not None and known is None:
            return  # an earlier job's feeder, on its way out: its deletion wakes us
        if verdict.feeder is FeederWish.RENEW and known is not None:
            await self._kube.delete(BATCH_JOB, namespace, name, known.uid)
        elif verdict.feeder is FeederWish.SUSPEND and known is not None and not (known.suspended or known.finished):
            await self._pause(namespace, name, True)
        elif verdict.feeder is FeederWish.RUN and known is not None and known.suspended:
            await self._pause(namespace, name, False)
        elif verdict.feeder is FeederWish.RUN and known is None and endpoint is not None:
            manifest = feeder(job, endpoint, self._settings.agent_image, self._settings.redis_url_of_agents)
            try:
                await self._kube.create(manifest)
            except ConflictError:
                return  # it exists already, and its event is on the way

    async def _pause(self, namespace: str, name: str, pause: bool) -> None:
        patch: dict[str, Any] = {"spec": {"suspend": pause}}
        try:
            await self._kube.merge(BATCH_JOB, namespace, name, patch)
        except NotFoundError:
            return
