"""What the worker and a feeder are told of a standalone job."""

from __future__ import annotations

from typing import Any

from coserve_agent.settings import PREFIX, AgentSettings
from coserve_agent.standalone.job import Job
from coserve_agent.standalone.paths import data_path, root_of
from coserve_api.common import timestamp
from coserve_api.errors import InvalidValueError
from coserve_contract.messages import Binding, Desired
from coserve_contract.told import binding_spec, feeder_settings


def binding_of(job: Job, epoch: int, settings: AgentSettings, desired: Desired = Desired.RUN) -> Binding:
    """The binding of `job` under `epoch`."""
    spec = binding_spec(
        job.spec,
        job_uid=job.uid,
        job_name=job.name,
        namespace=settings.namespace,
        adapter_number=job.number,
        start=job.start,
        template_variables=_variables(job, settings),
        max_slowdown_percent=None,
    )
    return Binding(epoch=epoch, desired=desired, spec=spec, restarts=job.restarts, resume=job.resume)


def feeder_environment(job: Job, settings: AgentSettings) -> dict[str, str]:
    """The variables of its feeder. InvalidValueError where its data are `outside`."""
    values: dict[str, object] = {
        "STATE": settings.state,
        "ENDPOINT_UID": settings.endpoint_uid,
        "JOB_UID": job.uid,
        "JOB_NAME": job.name,
        "MODEL_PATH": settings.model_path,
        "DATASET_PATH": data_path(job.spec.dataset.uri),
        "DATASET_ROOT": root_of(job.spec.dataset.uri, settings.data_roots),
        **feeder_settings(
            job.spec,
            created=timestamp(job.created),
            max_model_length=settings.max_model_length,
            template_variables=_variables(job, settings),
        ),
    }
    if job.spec.evaluation.uri is not None:
        values["EVAL_PATH"] = data_path(job.spec.evaluation.uri)
        values["EVAL_ROOT"] = root_of(job.spec.evaluation.uri, settings.data_roots)
    return {PREFIX + name: str(value) for name, value in values.items()}


def outside(job: Job, settings: AgentSettings) -> str | None:
    """Why its data may not be read, where the server was started with other folders than the one that took it."""
    for uri in (job.spec.dataset.uri, job.spec.evaluation.uri):
        try:
            if uri is not None:
                root_of(uri, settings.data_roots)
        except InvalidValueError as error:
            return str(error)
    return None


def _variables(job: Job, settings: AgentSettings) -> dict[str, Any]:
    """Of the chat template: what its adapter is served with when nobody says otherwise."""
    return {**settings.template_variables, **job.spec.dataset.template_variables}
