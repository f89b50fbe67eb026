"""What makes a job fail by its own fault: rules between objects, and bad data. Each message says what to change."""

from collections.abc import Sequence

from coserve_api.common import variables_fault
from coserve_api.endpoint import InferenceEndpoint
from coserve_api.errors import InvalidValueError
from coserve_api.job import FailedReason, FinetuneJob, PublishPolicy
from coserve_api.job_status import ContinuedFrom
from coserve_api.messages import Completed, FeedStatus
from coserve_api.uris import relative_path
from coserve_operator.reconcile.briefing import template_variables
from coserve_operator.reconcile.observed import FeederView
from coserve_operator.reconcile.sources import unreadable

Failure = tuple[FailedReason, str]
NOT_IMPROVED = {
    PublishPolicy.IF_EVAL_IMPROVES: "the evaluation loss did not fall",
    PublishPolicy.BEST: "no evaluation loss was below the initial one",
}
"""Why a policy kept a trained adapter from being published."""


def refusal(job: FinetuneJob, endpoint: InferenceEndpoint, rivals: Sequence[FinetuneJob]) -> Failure | None:
    """Return why a job that has not started may not run on `endpoint`; `rivals` are its other living jobs."""
    adapter, name = job.spec.adapter, endpoint.metadata.name
    most = endpoint.spec.finetuning.max_rank
    if adapter.rank is not None and adapter.rank > most:
        remedy = "lower it, or raise the endpoint's spec.finetuning.maxRank"
        message = f"spec.adapter.rank is {adapter.rank}, and endpoint {name} allows {most}: {remedy}"
        return FailedReason.RANK_TOO_LARGE, message
    astray = unreadable(adapter.source, endpoint) if adapter.source is not None else None
    if astray is not None:
        return FailedReason.ENDPOINT_REJECTED, astray
    longest, wanted = endpoint.spec.model.max_model_length, job.spec.dataset.max_sequence_length
    if wanted is not None and wanted > longest:
        message = (
            f"spec.dataset.maxSequenceLength is {wanted}, and endpoint {name} has maxModelLength {longest}: lower it"
        )
        return FailedReason.ENDPOINT_REJECTED, message
    fault = variables_fault(template_variables(job, endpoint))
    if fault:
        message = f"spec.dataset.templateVariables, with the endpoint's spec.engine.templateVariables, {fault}"
        return FailedReason.INVALID_DATASET, message
    if adapter.name == endpoint.model_name:
        message = f"spec.adapter.name {adapter.name} is the name of the endpoint's base model: choose another"
        return FailedReason.NAME_TAKEN, message
    holder = min((job, *(each for each in rivals if each.spec.adapter.name == adapter.name)), key=precedence)
    if holder.metadata.uid != job.metadata.uid:
        remedy = "choose another spec.adapter.name, or create this job anew when that one is over"
        message = f"FinetuneJob {holder.metadata.name} is training adapter {adapter.name}: {remedy}"
        return FailedReason.NAME_TAKEN, message
    return None


def source_missing(job: FinetuneJob, endpoint: InferenceEndpoint, found: ContinuedFrom | None) -> str | None:
    """Return why a job cannot begin yet: the adapter that it goes on from is not published."""
    named = job.spec.adapter.source
    if named is None or found is not None:
        return None
    return (
        f"spec.adapter.from is {named}, and endpoint {endpoint.metadata.name} has published no adapter of that name: "
        "training begins once it has; else create the job anew with another"
    )


def precedence(job: FinetuneJob) -> tuple[bool, str, str]:
    """Return who has a name: started jobs before others, then the older."""
    return job.status.start_time is None, job.metadata.creation_timestamp or "", job.metadata.uid


def checkpoint_astray(job: FinetuneJob, endpoint: InferenceEndpoint) -> Failure | None:
    """Return why the checkpoint in status is of no use: the endpoint was made anew with another artifact store."""
    if job.status.checkpoint is None:
        return None
    try:
        relative_path(endpoint.spec.artifact_store.uri, job.status.checkpoint.uri)
    except InvalidValueError as error:
        message = f"the last checkpoint cannot be resumed: {error}; create the job anew"
        return FailedReason.ARTIFACT_STORE_ERROR, message
    return None


def ended_early(result: Completed, feed: FeedStatus | None) -> str:
    """Return why a complete job did not do all the steps that its data has; nothing where it did."""
    if feed is None or result.step >= feed.total_steps:
        return ""
    return f"spec.evaluation.patience ended it after step {result.step} of {feed.total_steps}"


def data_failure(feed: FeedStatus | None, feeder: FeederView | None) -> Failure | None:
    """Return what is wrong with the data, or with the program that reads it."""
    if feed is not None and feed.error is not None:
        line = f"line {feed.error.line}: " if feed.error.line is not None else ""
        return feed.error.reason, line + feed.error.message
    if feeder is not None and feeder.failure is not None:
        return FailedReason.INTERNAL_ERROR, f"the feeder failed: {feeder.failure}"
    return None
