"""What a job waits for that somebody may change: rules between objects; and what makes it fail: its own data. Each
message says what to change.
"""

from coserve_api.adapters import MAX_ADAPTERS, AdapterState
from coserve_api.common import variables_fault
from coserve_api.endpoint import InferenceEndpoint
from coserve_api.errors import InvalidValueError
from coserve_api.job import FinetuneJob, PublishPolicy
from coserve_api.job_status import ContinuedFrom, FailedReason, PendingReason, PublishedAdapter
from coserve_api.uris import parse_uri, relative_path
from coserve_contract.messages import Completed, FeedStatus
from coserve_operator.decide import observed
from coserve_operator.decide.claims import Claims
from coserve_operator.decide.observed import FeederView
from coserve_operator.decide.sources import checkpoint_of, elsewhere, unreadable
from coserve_operator.manifests.feeder import template_variables
from coserve_operator.manifests.pods import artifact_claims

Failure = tuple[FailedReason, str]
Obstacle = tuple[PendingReason, str]
NOT_IMPROVED = {
    PublishPolicy.IF_EVAL_IMPROVES: "the evaluation loss did not fall",
    PublishPolicy.BEST: "no evaluation loss was below the initial one",
}
"""Why a policy kept a trained adapter from being published."""


def obstacle(job: FinetuneJob, endpoint: InferenceEndpoint, claims: Claims) -> Obstacle | None:
    """Return why a job that has not started may not run on `endpoint` as they are now; `claims` are those of its living
    jobs. Each of them may change.
    """
    adapter, name = job.spec.adapter, endpoint.metadata.name
    most = endpoint.spec.finetuning.max_rank
    if adapter.rank is not None and adapter.rank > most:
        remedy = "lower it, or raise the endpoint's spec.finetuning.maxRank"
        message = f"spec.adapter.rank is {adapter.rank}, and endpoint {name} allows {most}: {remedy}"
        return PendingReason.RANK_TOO_LARGE, message
    away = unreadable(adapter.source, endpoint) if adapter.source is not None else elsewhere(job, endpoint)
    if away is not None:
        return PendingReason.ENDPOINT_REJECTED, away
    denied = dataset_denied(job, endpoint)
    if denied is not None:
        return PendingReason.DATASET_NOT_ALLOWED, denied
    longest, wanted = endpoint.spec.model.max_model_length, job.spec.dataset.max_sequence_length
    if wanted is not None and wanted > longest:
        message = (
            f"spec.dataset.maxSequenceLength is {wanted}, and endpoint {name} has maxModelLength {longest}: lower it"
        )
        return PendingReason.ENDPOINT_REJECTED, message
    fault = variables_fault(template_variables(job, endpoint))
    if fault:
        message = f"spec.dataset.templateVariables, with the endpoint's spec.engine.templateVariables, {fault}"
        return PendingReason.ENDPOINT_REJECTED, message
    if adapter.name == endpoint.model_name:
        message = f"spec.adapter.name {adapter.name} is the name of the endpoint's base model: choose another"
        return PendingReason.NAME_TAKEN, message
    owner = claims.owner_elsewhere(job)
    if owner:
        mine = repr(job.publisher) if job.publisher else "the publisher in its annotation coserve.dev/publisher"
        remedy = f"choose another, or have the endpoint's spec.adapters give the name to {mine}"
        message = f"spec.adapter.name {adapter.name} belongs to {owner!r}, who published it first: {remedy}"
        return PendingReason.NAME_TAKEN, message
    holder = claims.holder(job)
    if holder.metadata.uid != job.metadata.uid:
        remedy = "this one begins when that one is over; or choose another spec.adapter.name"
        message = f"FinetuneJob {holder.metadata.name} is training adapter {adapter.name}: {remedy}"
        return PendingReason.NAME_TAKEN, message
    if not claims.has_room(job):
        message = (
            f"endpoint {name} has {MAX_ADAPTERS} adapters, with those that jobs are training, and may have no more: "
            "choose a spec.adapter.name that it has, or another endpoint"
        )
        return PendingReason.TOO_MANY_ADAPTERS, message
    return None


def pod_obstacle(feeder: FeederView | None) -> observed.Obstacle | None:
    """Return what keeps a feeder's pod from running; more nodes may come by themselves, and a program is run again."""
    if feeder is None or feeder.trouble is None:
        return None
    return observed.Obstacle(*feeder.trouble, passing=feeder.trouble[0] in ("Unschedulable", "FeederFailed"))


def asleep(endpoint: InferenceEndpoint | None) -> str:
    """Return what is to be added where a job waits for agents, and none is asked for."""
    if endpoint is None or endpoint.spec.replicas > 0:
        return ""
    return f"; endpoint {endpoint.metadata.name} has spec.replicas 0: raise it for the job to go on"


def dataset_denied(job: FinetuneJob, endpoint: InferenceEndpoint) -> str | None:
    """Return why a job may not read its data: who writes a job need not be one who may mount the namespace's claims."""
    name, allowed = endpoint.metadata.name, endpoint.spec.finetuning.dataset_claims
    for field, uri in (("dataset", job.spec.dataset.uri), ("evaluation", job.spec.evaluation.uri)):
        claim = None if uri is None else parse_uri(uri).claim
        if claim is None:
            continue
        if claim in artifact_claims(endpoint):
            return (
                f"spec.{field}.uri is in claim {claim}, which holds the checkpoints and adapters of endpoint {name}: "
                "copy the data into another claim"
            )
        if claim not in allowed:
            listed = ", ".join(allowed) or "none"
            return (
                f"spec.{field}.uri is in claim {claim}, and endpoint {name} lets jobs read {listed}: name another, or "
                "have the claim added to the endpoint's spec.finetuning.datasetClaims"
            )
    return None


def source_missing(job: FinetuneJob, endpoint: InferenceEndpoint, found: ContinuedFrom | None) -> Obstacle | None:
    """Return why a job cannot begin yet: what it goes on from is not there."""
    named, resumed = job.spec.adapter.source, job.spec.resume_from
    if resumed is not None and checkpoint_of(job, endpoint, found) is None:
        which = f"job is {resumed.job}" if resumed.job is not None else f"uri is {resumed.uri}"
        there = "has no job of that name that is Complete or Failed and has a checkpoint in its artifact store"
        remedy = "training begins once it has; else create the job anew with uri and sha256 of a checkpoint"
        message = f"spec.resumeFrom.{which}, and endpoint {endpoint.metadata.name} {there}: {remedy}"
        return PendingReason.CHECKPOINT_NOT_FOUND, message
    if named is None or found is not None:
        return None
    return PendingReason.ADAPTER_NOT_FOUND, (
        f"spec.adapter.from is {named}, and endpoint {endpoint.metadata.name} has published no adapter of that name: "
        "training begins once it has; else create the job anew with another"
    )


def only_stored(adapter: PublishedAdapter, endpoint: InferenceEndpoint) -> str:
    """Return why no agent is to load a version that was published; nothing where they are."""
    override, name = endpoint.override(adapter.name), endpoint.metadata.name
    if override is None:
        return ""
    if override.state is AdapterState.ABSENT:
        why = f"spec.adapters of endpoint {name} hides the name (state Absent)"
    elif override.version not in (None, adapter.version):
        why = f"spec.adapters of endpoint {name} pins version {override.version}"
    else:
        return ""
    return f"{adapter.name} version {adapter.version} is stored and not served: {why}; take the entry out to serve it"


def checkpoint_elsewhere(job: FinetuneJob, endpoint: InferenceEndpoint) -> Obstacle | None:
    """Return why the checkpoint in status is of no use: the endpoint was made anew with another artifact store."""
    if job.status.checkpoint is None:
        return None
    try:
        relative_path(endpoint.spec.artifact_store.uri, job.status.checkpoint.uri)
    except InvalidValueError as error:
        remedy = "create the endpoint with that artifact store again, or the job anew"
        return PendingReason.ENDPOINT_REJECTED, f"the last checkpoint cannot be resumed: {error}; {remedy}"
    return None


def ended_early(result: Completed, feed: FeedStatus | None) -> str:
    """Return why a complete job did not do all the steps that its data has; nothing where it did."""
    if feed is None or result.step >= feed.total_steps:
        return ""
    return f"spec.evaluation.patience ended it after step {result.step} of {feed.total_steps}"


def data_failure(feed: FeedStatus | None, feeder: FeederView | None) -> Failure | None:
    """Return what is wrong with the data, or with the program that reads it where it never came to an end of reading:
    else its failure is that of a machine, and it is run again.
    """
    if feed is not None and feed.error is not None:
        line = f"line {feed.error.line}: " if feed.error.line is not None else ""
        return feed.error.reason, line + feed.error.message
    read = feed is not None and feed.total_steps > 0
    if feeder is not None and feeder.failure is not None and not read:
        return FailedReason.INTERNAL_ERROR, f"the feeder failed: {feeder.failure}"
    return None
