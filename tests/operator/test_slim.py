"""Objects that are kept are as they were read, without what pydantic keeps beside."""

from __future__ import annotations

import sys
from typing import Any

from pydantic import BaseModel

from coserve_api.job import FinetuneJob
from coserve_operator.kube import FINETUNE_JOB
from coserve_operator.watch.cache import Cache
from coserve_operator.watch.slim import slim

CONDITIONS = ("Accepted", "DataReady", "Bound", "Running", "Complete", "Failed", "Finished")


def body() -> dict[str, Any]:
    at = "2026-12-01T00:00:00Z"
    said = {"status": "True", "reason": "Said", "message": "", "lastTransitionTime": at, "observedGeneration": 1}
    conditions = [{"type": each, **said} for each in CONDITIONS]
    return {
        "metadata": {"name": "job", "namespace": "tenant", "uid": "u", "resourceVersion": "7", "generation": 1},
        "spec": {
            "endpointRef": {"name": "tiny"},
            "dataset": {"uri": "pvc://data/train.jsonl"},
            "adapter": {"name": "adapter", "rank": 4},
            "training": {"maxSteps": 10},
        },
        "status": {"state": "Running", "conditions": conditions, "progress": {"step": 1}},
    }


def kept_bytes(value: Any, seen: set[int]) -> int:
    """Of a value and all that it refers to, each once."""
    if id(value) in seen or isinstance(value, type):
        return 0
    seen.add(id(value))
    size = sys.getsizeof(value)
    if isinstance(value, BaseModel):
        parts: list[Any] = [value.__dict__, value.__pydantic_fields_set__, value.__pydantic_extra__]
        return size + sum(kept_bytes(part, seen) for part in parts)
    if isinstance(value, dict):
        return size + sum(kept_bytes(part, seen) for part in (*value.keys(), *value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return size + sum(kept_bytes(part, seen) for part in value)
    return size


def test_a_slim_job_says_what_it_said_and_takes_a_third_less() -> None:
    whole = FinetuneJob.from_dict(body())
    kept = slim(FinetuneJob.from_dict(body()))
    assert kept == whole
    assert kept.model_dump(mode="json", by_alias=True) == whole.model_dump(mode="json", by_alias=True)
    assert kept_bytes(kept, set()) < 0.67 * kept_bytes(whole, set())


def test_a_copy_of_a_slim_job_leaves_the_others_alone() -> None:
    first, second = slim(FinetuneJob.from_dict(body())), slim(FinetuneJob.from_dict(body()))
    changed = first.model_copy(update={"status": first.status.model_copy(update={"observed_generation": 9})})
    assert changed.status.observed_generation == 9
    assert not first.model_fields_set and not second.model_fields_set
    assert first == second != changed


def test_the_cache_keeps_slim_jobs() -> None:
    cache = Cache()
    cache.put(FINETUNE_JOB, body())
    (job,) = cache.group(("tenant", "tiny")).jobs
    assert not job.status.conditions[0].model_fields_set
