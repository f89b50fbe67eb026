"""Whether a job can be taken, and the job that it becomes: what the API server and the operator check in a cluster."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

from coserve_agent.http.errors import ApiError, bad_request
from coserve_agent.settings import AgentSettings
from coserve_agent.standalone.job import Job
from coserve_agent.standalone.paths import root_of
from coserve_agent.standalone.spec import INVALID, JobRequest, LocalJobSpec
from coserve_api.endpoint import FinetuningPolicy
from coserve_api.errors import InvalidValueError
from coserve_api.job import DEFAULT_RANK
from coserve_contract.messages import AdapterRecord, Checkpoint
from coserve_contract.told import start_at

MOST_JOBS = 1000
"""That are kept, those that are over included."""


@dataclass(frozen=True)
class There:
    """What there is: `jobs` by name, `published` versions by name, the last checkpoint of each job by uid, and the
    names of adapters that were `loaded` by hand.
    """

    jobs: Mapping[str, Job]
    published: Mapping[str, AdapterRecord]
    checkpoints: Mapping[str, Checkpoint]
    loaded: Set[str] = frozenset()


def admitted(request: JobRequest, there: There, settings: AgentSettings, now_s: float) -> Job:
    """The job that `request` asks for.

    Raises:
        ApiError: 400 that names the field, its value and the remedy; 409 where the name is taken.
    """
    spec = request.spec
    if settings.finetuning is FinetuningPolicy.DISABLED:
        raise bad_request("this server was started with finetuning Disabled: start it with Allowed", None, INVALID)
    if len(there.jobs) >= MOST_JOBS:
        raise ApiError(409, f"there are {MOST_JOBS} jobs: delete some that are over", code="too_many_jobs")
    uid = uuid.uuid4().hex
    name = request.name or f"{spec.adapter.name[:50]}-{uid[:5]}"
    if name in there.jobs:
        message = f"name is {name!r}, and there is a job of that name: choose another, or delete that one"
        raise ApiError(409, message, param="name", code="name_taken")
    if spec.adapter.name in there.loaded:
        message = f"spec.adapter.name is {spec.adapter.name!r}, which was loaded by hand: unload it, or choose another"
        raise ApiError(409, message, param="spec.adapter.name", code="name_taken")
    _check_data(spec, settings)
    _check_limits(spec, settings)
    job = Job(name=name, uid=uid, created_s=now_s, spec=spec, number=_number(spec.adapter.name, there))
    return _going_on(job.model_copy(update={"suspended": spec.suspend}), there)


def _check_data(spec: LocalJobSpec, settings: AgentSettings) -> None:
    for field, uri in (("spec.dataset.uri", spec.dataset.uri), ("spec.evaluation.uri", spec.evaluation.uri)):
        try:
            if uri is not None:
                root_of(uri, settings.data_roots)
        except InvalidValueError as error:
            raise bad_request(f"{field}: {error}", field, INVALID) from None


def _check_limits(spec: LocalJobSpec, settings: AgentSettings) -> None:
    adapter, longest = spec.adapter, spec.dataset.max_sequence_length
    rank = adapter.rank or (DEFAULT_RANK if adapter.source is None else 0)
    if rank > settings.max_rank:
        message = f"spec.adapter.rank is {rank}, and this server allows up to {settings.max_rank}: lower it"
        raise bad_request(message, "spec.adapter.rank", INVALID)
    if adapter.name == settings.model_name:
        message = f"spec.adapter.name is {adapter.name!r}, the base model's name: choose another"
        raise bad_request(message, "spec.adapter.name", INVALID)
    if longest is not None and longest > settings.max_model_length:
        message = (
            f"spec.dataset.maxSequenceLength is {longest}, and this server's is {settings.max_model_length}: lower it"
        )
        raise bad_request(message, "spec.dataset.maxSequenceLength", INVALID)


def _number(adapter: str, there: There) -> int:
    """The next version of a name; one that a job will publish is taken."""
    taken = [job.number for job in there.jobs.values() if job.spec.adapter.name == adapter]
    published = there.published.get(adapter)
    return 1 + max([0, *taken, *([published.number] if published else [])])


def _going_on(job: Job, there: There) -> Job:
    """With what it goes on from, where it says so."""
    source, resumed = job.spec.adapter.source, job.spec.resume_from
    if source is not None:
        found = there.published.get(source)
        if found is None:
            raise _missing("spec.adapter.from", source, "a published adapter", there.published)
        return job.model_copy(update={"start": start_at(job.spec, found.path, found.sha256)})
    if resumed is not None:
        over = {name: one.uid for name, one in there.jobs.items() if one.ended and one.uid in there.checkpoints}
        if resumed.job not in over:
            raise _missing("spec.resumeFrom.job", resumed.job or resumed.uri or "", "a job that is over", over)
        last = there.checkpoints[over[resumed.job]]
        return job.model_copy(update={"start": start_at(job.spec, last.path, last.sha256), "resume": last})
    return job


def _missing(field: str, value: str, what: str, known: Iterable[str]) -> ApiError:
    names = ", ".join(sorted(known)[:20]) or "none"
    return bad_request(f"{field} is {value!r}: name {what}; there are: {names}", field, INVALID)
