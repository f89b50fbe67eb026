"""What the watches have shown: the newest version of each object, and which group of objects belongs together.

A group is an endpoint with its jobs: they are decided on together, so that no two jobs are given the same agent.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from coserve_api.endpoint import InferenceEndpoint
from coserve_api.job import FinetuneJob
from coserve_operator.kube import AUTOSCALER, BATCH_JOB, DEPLOYMENT, ENDPOINT, FINETUNE_JOB, POD, Kind, Manifest
from coserve_operator.resources.metadata import APP, ENDPOINT_LABEL, FEEDER_APP, JOB_LABEL, JOB_UID_LABEL

logger = logging.getLogger(__name__)

Name = tuple[str, str]
"""Namespace and name: of an object, or of the endpoint that gives a group its name."""
WATCHED: tuple[Kind, ...] = (ENDPOINT, FINETUNE_JOB, DEPLOYMENT, BATCH_JOB, POD, AUTOSCALER)
Stored = Any  # an InferenceEndpoint, a FinetuneJob or a Manifest, by kind


@dataclass
class _Shelf:
    """Objects of one kind, with the groups that they belong to."""

    objects: dict[Name, Stored] = field(default_factory=dict)
    versions: dict[Name, int] = field(default_factory=dict)
    members: dict[Name, set[Name]] = field(default_factory=dict)
    group_of: dict[Name, Name] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """An endpoint, which may be missing, and what belongs to it."""

    endpoint: InferenceEndpoint | None
    jobs: tuple[FinetuneJob, ...]
    deployment: Manifest | None
    autoscaler: Manifest | None
    pods: tuple[Manifest, ...]
    feeders: dict[str, Manifest]
    feeder_pods: dict[str, tuple[Manifest, ...]]
    """Feeders and their pods by the name of the job."""
    fed_jobs: frozenset[str]
    """Uids of the jobs, also deleted ones, that a feeder's pod works for."""


class World:
    """A cache of watched objects that never goes back to an older version."""

    def __init__(self) -> None:
        self._shelves = {kind: _Shelf() for kind in WATCHED}

    def put(self, kind: Kind, body: Manifest) -> set[Name]:
        """Remember an object; return the groups that it touches, none when it is not newer than what is known."""
        shelf, name = self._shelves[kind], _name(body)
        version = int(body["metadata"].get("resourceVersion") or 0)
        if version <= shelf.versions.get(name, -1):
            return set()
        stored = _parse(kind, body)
        if stored is None:
            return set()
        touched = self._take_out(shelf, name)
        shelf.objects[name], shelf.versions[name] = stored, version
        group = _group_of(kind, stored)
        if group is not None:
            shelf.group_of[name] = group
            shelf.members.setdefault(group, set()).add(name)
            touched.add(group)
        return touched

    def remove(self, kind: Kind, name: Name) -> set[Name]:
        """Forget an object that is gone; return the groups that it belonged to."""
        shelf = self._shelves[kind]
        touched = self._take_out(shelf, name)
        shelf.versions.pop(name, None)
        return touched

    def replace_all(self, kind: Kind, listed: Sequence[Manifest], version: int) -> set[Name]:
        """Take a full list as of `version`: what is older and not in it is gone. A watch may have missed deletions."""
        shelf, names = self._shelves[kind], {_name(body) for body in listed}
        touched: set[Name] = set()
        for name in shelf.objects.keys() - names:
            if shelf.versions[name] <= version:
                touched |= self.remove(kind, name)
        for body in listed:
            touched |= self.put(kind, body)
        return touched

    def groups(self) -> set[Name]:
        """Return all groups that have an endpoint or a job."""
        return {name for kind in (ENDPOINT, FINETUNE_JOB) for name in self._shelves[kind].members}

    def endpoints(self) -> Iterable[InferenceEndpoint]:
        """Return all endpoints."""
        return self._shelves[ENDPOINT].objects.values()

    def group(self, name: Name) -> Group:
        """Return the group of the endpoint with this name."""
        feeders = self._members(BATCH_JOB, name)
        pods = self._members(POD, name)
        feeder_pods: dict[str, tuple[Manifest, ...]] = {}
        for pod in pods:
            labels = pod["metadata"]["labels"]
            if labels.get(APP) == FEEDER_APP:
                job = labels.get(JOB_LABEL, "")
                feeder_pods[job] = (*feeder_pods.get(job, ()), pod)
        return Group(
            endpoint=self._shelves[ENDPOINT].objects.get(name),
            jobs=tuple(self._members(FINETUNE_JOB, name)),
            deployment=self._shelves[DEPLOYMENT].objects.get(name),
            autoscaler=self._shelves[AUTOSCALER].objects.get(name),
            pods=tuple(pod for pod in pods if pod["metadata"]["labels"].get(APP) != FEEDER_APP),
            feeders={feeder["metadata"]["labels"].get(JOB_LABEL, ""): feeder for feeder in feeders},
            feeder_pods=feeder_pods,
            fed_jobs=frozenset(
                pod["metadata"]["labels"].get(JOB_UID_LABEL, "") for found in feeder_pods.values() for pod in found
            ),
        )

    def _members(self, kind: Kind, group: Name) -> list[Stored]:
        shelf = self._shelves[kind]
        return [shelf.objects[name] for name in sorted(shelf.members.get(group, ()))]

    @staticmethod
    def _take_out(shelf: _Shelf, name: Name) -> set[Name]:
        """Remove an object and return the groups that held it."""
        shelf.objects.pop(name, None)
        group = shelf.group_of.pop(name, None)
        if group is None:
            return set()
        shelf.members[group].discard(name)
        if not shelf.members[group]:
            del shelf.members[group]
        return {group}


def _name(body: Manifest) -> Name:
    return body["metadata"]["namespace"], body["metadata"]["name"]


def _parse(kind: Kind, body: Manifest) -> Stored | None:
    try:
        if kind is ENDPOINT:
            return InferenceEndpoint.from_dict(body)
        if kind is FINETUNE_JOB:
            return FinetuneJob.from_dict(body)
    except ValidationError as error:
        logger.error("%s %s cannot be read and is left alone: %s", kind.name, "/".join(_name(body)), error)
        return None
    metadata = {key: value for key, value in body["metadata"].items() if key != "managedFields"}
    return {**body, "metadata": metadata}


def _group_of(kind: Kind, stored: Stored) -> Name | None:
    if kind is ENDPOINT:
        return stored.metadata.namespace, stored.metadata.name
    if kind is FINETUNE_JOB:
        return stored.metadata.namespace, stored.spec.endpoint_ref.name
    metadata = stored["metadata"]
    endpoint = (metadata.get("labels") or {}).get(ENDPOINT_LABEL)
    return None if endpoint is None else (metadata["namespace"], endpoint)
