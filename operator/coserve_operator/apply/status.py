"""Writing the status of an object of ours: over the version that was decided on, and then into the cache."""

from datetime import datetime
from typing import Any

from coserve_api.common import ObjectMeta
from coserve_api.conditions import Condition, condition, find_condition, merge_conditions
from coserve_api.endpoint import InferenceEndpoint
from coserve_api.endpoint_status import EndpointCondition, EndpointStatus
from coserve_api.job import FinetuneJob
from coserve_api.job_status import JobCondition, JobState, JobStatus
from coserve_operator.apply.budget import StatusBudget
from coserve_operator.kube import ENDPOINT, FINETUNE_JOB, Kind, Kube, NotFoundError
from coserve_operator.watch.cache import Cache, UnreadableObject


async def write_status(
    kube: Kube, cache: Cache, budget: StatusBudget, kind: Kind, meta: ObjectMeta, status: dict[str, Any]
) -> bool:
    """Return False when the object is gone.

    ConflictError: it has changed since it was read.
    """
    manifest = {
        "apiVersion": kind.api_version,
        "kind": kind.name,
        "metadata": {"name": meta.name, "namespace": meta.namespace, "resourceVersion": meta.resource_version},
        "status": status,
    }
    try:
        written = await kube.apply(manifest, "status")
    except NotFoundError:
        cache.remove(kind, (meta.namespace, meta.name), meta.uid)
        return False
    budget.written(meta.uid)
    cache.put(kind, written)
    return True


async def greet(
    kube: Kube, cache: Cache, budget: StatusBudget, new: InferenceEndpoint | FinetuneJob, now: datetime
) -> None:
    """Write the first status of an object: it was seen, and nothing is known yet.

    ConflictError: it has changed since it was read.
    """
    meta, said = new.metadata, "Accepted"
    told: dict[str, bool | None] = {JobCondition.ACCEPTED: True, JobCondition.RECONCILING: True}
    status: EndpointStatus | JobStatus
    if isinstance(new, InferenceEndpoint):
        kind, status, told[EndpointCondition.READY] = ENDPOINT, new.status, None
    else:
        kind, status = FINETUNE_JOB, new.status.model_copy(update={"state": JobState.PENDING, "reason": said})
        told[JobCondition.FINISHED] = False
    conditions = tuple(condition(each, so, said, "", generation=meta.generation, now=now) for each, so in told.items())
    status = status.model_copy(update={"conditions": conditions})
    await write_status(kube, cache, budget, kind, meta, status.to_dict())


async def refuse(kube: Kube, cache: Cache, budget: StatusBudget, unreadable: UnreadableObject, now: datetime) -> None:
    """Say that an object cannot be read; the rest of its status stays as it is.

    ConflictError: it has changed since it was read.
    """
    meta, old = unreadable.metadata, unreadable.status.get("conditions") or []
    before = tuple(Condition.model_validate(each) for each in old)
    said = find_condition(before, EndpointCondition.ACCEPTED)
    if said is not None and (said.status, said.message) == ("False", unreadable.fault):
        return
    kind, fault = EndpointCondition.ACCEPTED, unreadable.fault
    new = condition(kind, False, "Unreadable", fault, generation=meta.generation, now=now)
    conditions = [each.to_dict() for each in merge_conditions(before, [new])]
    await write_status(kube, cache, budget, unreadable.kind, meta, {**unreadable.status, "conditions": conditions})
