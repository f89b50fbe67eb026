"""What an agent is told of a job, and from where it goes on."""

from coserve_api.endpoint import InferenceEndpoint
from coserve_api.job import DEFAULT_ALPHA, DEFAULT_RANK, FinetuneJob, RsloraPolicy, TargetModule
from coserve_api.job_status import ContinuedFrom
from coserve_api.uris import relative_path
from coserve_contract.messages import Binding, BindingSpec, Checkpoint, Desired
from coserve_contract.store import JobRecord
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
    spec = job.spec
    new = source is None
    return Binding(
        epoch=epoch,
        desired=desired,
        restarts=restarts,
        resume=newer_checkpoint(job, endpoint, record, epoch) or checkpoint_of(job, endpoint, source),
        spec=BindingSpec(
            job_uid=job.metadata.uid,
            job_name=job.metadata.name,
            namespace=job.metadata.namespace,
            adapter_name=spec.adapter.name,
            adapter_number=adapter_number,
            rank=(spec.adapter.rank or DEFAULT_RANK) if new else None,
            alpha=(spec.adapter.alpha or DEFAULT_ALPHA) if new else None,
            target_modules=(spec.adapter.target_modules or tuple(TargetModule)) if new else None,
            learning_rate=float(spec.training.learning_rate),
            schedule=spec.training.schedule,
            warmup_steps=spec.training.warmup_steps,
            batch_size=spec.training.batch_size,
            weight_decay=float(spec.training.weight_decay),
            max_grad_norm=float(spec.training.max_grad_norm),
            seed=spec.training.seed,
            checkpoint_every_steps=spec.checkpoint.every_steps,
            checkpoint_keep=spec.checkpoint.keep,
            publish=spec.publish.policy,
            dropout=float(spec.adapter.dropout),
            use_rslora=spec.adapter.use_rslora is RsloraPolicy.ENABLED,
            adam_beta1=float(spec.training.adam_beta1),
            adam_beta2=float(spec.training.adam_beta2),
            adam_epsilon=float(spec.training.adam_epsilon),
            eval_every_steps=spec.evaluation.every_steps,
            patience=spec.evaluation.patience,
            start=None if source is None else start_of(job, endpoint, source),
            priority=spec.priority,
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
