"""What an agent is told of a job, and from where it goes on."""

from coserve_api.endpoint import InferenceEndpoint
from coserve_api.job import FinetuneJob
from coserve_api.job_status import ContinuedFrom
from coserve_api.uris import relative_path
from coserve_contract.messages import Binding, Checkpoint, Desired
from coserve_contract.store import JobRecord
from coserve_contract.told import binding_spec
from coserve_operator.decide.sources import checkpoint_of, start_of
from coserve_operator.manifests.feeder import template_variables


def binding_of(
    job: FinetuneJob,
    endpoint: InferenceEndpoint,
    epoch: int,
    desired: Desired,
    adapter_number: int,
    restarts: int,
    record: JobRecord,
    source: ContinuedFrom | None = None,
) -> Binding:
    """Return the binding of `job` under `epoch`: it resumes from the newer of status' and Redis' checkpoints, else it
    begins with `source`, an adapter or another job's checkpoint, or anew.
    """
    return Binding(
        epoch=epoch,
        desired=desired,
        restarts=restarts,
        resume=newer_checkpoint(job, endpoint, record, epoch) or checkpoint_of(job, endpoint, source),
        spec=binding_spec(
            job.spec,
            job_uid=job.metadata.uid,
            job_name=job.metadata.name,
            namespace=job.metadata.namespace,
            adapter_number=adapter_number,
            start=None if source is None else start_of(job, endpoint, source),
            template_variables=template_variables(job, endpoint),
            max_slowdown_percent=endpoint.spec.finetuning.max_slowdown_percent,
        ),
    )


def newer_checkpoint(job: FinetuneJob, endpoint: InferenceEndpoint, record: JobRecord, epoch: int) -> Checkpoint | None:
    """Return the one of more steps: the status's, or the one that Redis accepted, which alone counts once the agent
    that is bound under `epoch` found the other corrupt.
    """
    recorded, accepted = job.status.checkpoint, record.checkpoint
    rewound = record.progress is not None and record.progress.epoch == epoch and record.progress.rewound != ""
    if recorded is None or (accepted is not None and (accepted.step >= recorded.step or rewound)):
        return accepted
    path = relative_path(endpoint.spec.artifact_store.uri, recorded.uri)
    return Checkpoint(
        step=recorded.step, cursor=recorded.cursor, epoch=recorded.epoch, path=path, sha256=recorded.sha256
    )
