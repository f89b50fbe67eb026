"""The objects: endpoints, and jobs that are over or are to run; those beyond the agents' places wait."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from coserve_operator.kube import ENDPOINT, FINETUNE_JOB, Kube, Manifest

from .servers import NAMESPACE

AT_ONCE = 16
ENDED = "2026-01-01T00:00:00Z"


def endpoint_name(number: int) -> str:
    return f"endpoint-{number:05d}"


def endpoint(number: int, places: int) -> Manifest:
    spec = {
        "model": {"uri": "pvc://models/tiny"},
        "artifactStore": {"uri": "pvc://artifacts/store"},
        "finetuning": {"datasetClaims": ["data"], "maxConcurrentJobs": max(1, places)},
    }
    return _object(ENDPOINT.name, endpoint_name(number), spec)


def job(name: str, number: int, endpoint: str) -> Manifest:
    spec = {
        "endpointRef": {"name": endpoint},
        "dataset": {"uri": "pvc://data/train.jsonl"},
        "adapter": {"name": f"adapter-{number}"},
        "training": {"epochs": 1},
        "publish": {"policy": "Never"},
    }
    return _object(FINETUNE_JOB.name, name, spec)


def ended(made: Manifest) -> Manifest:
    """The status of a job that is over."""
    told = [
        {"type": kind, "status": "True", "reason": "Completed", "message": "", "observedGeneration": 1,
         "lastTransitionTime": ENDED}
        for kind in ("Accepted", "Complete", "Finished")
    ]  # fmt: skip
    status = {"state": "Complete", "observedGeneration": 1, "completionTime": ENDED, "conditions": told}
    return {**_object(made["kind"], made["metadata"]["name"], {}), "status": status}


async def create(kube: Kube, manifests: Iterable[Manifest]) -> list[Manifest]:
    return await all_of([lambda each=each: kube.create(each) for each in manifests])


async def all_of(calls: list[Callable[[], Awaitable[Any]]], at_once: int = AT_ONCE) -> list[Any]:
    """What the calls give, so many at once."""
    gate = asyncio.Semaphore(at_once)

    async def one(call: Callable[[], Awaitable[Any]]) -> Any:
        async with gate:
            return await call()

    return await asyncio.gather(*(one(call) for call in calls))


def _object(kind: str, name: str, spec: dict[str, Any]) -> Manifest:
    made: Manifest = {"apiVersion": ENDPOINT.api_version, "kind": kind}
    made["metadata"] = {"name": name, "namespace": NAMESPACE}
    return made | ({"spec": spec} if spec else {})
