"""What the watches have shown: the newest version of each object, and which group of objects belongs together.

A group is an endpoint with its jobs: they are decided on together, so that no two jobs are given the same agent.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from coserve_api.common import ObjectMeta
from coserve_api.endpoint import InferenceEndpoint
from coserve_api.job import FinetuneJob
from coserve_operator.kube import AUTOSCALER, BATCH_JOB, DEPLOYMENT, ENDPOINT, FINETUNE_JOB, POD, Kind, Manifest
from coserve_operator.manifests.metadata import APP, ENDPOINT_LABEL, FEEDER_APP, JOB_LABEL, JOB_UID_LABEL

logger = logging.getLogger(__name__)

Name = tuple[str, str]
"""Namespace and name: of an object, or of the endpoint that gives a group its name."""
WATCHED: tuple[Kind, ...] = (ENDPOINT, FINETUNE_JOB, DEPLOYMENT, BATCH_JOB, POD, AUTOSCALER)
READ_METADATA = (
    "name", "namespace", "uid", "resourceVersion", "generation", "labels", "annotations", "ownerReferences",
    "deletionTimestamp",
)  # fmt: skip
READ_SPEC: dict[Kind, tuple[str, ...]] = {
    DEPLOYMENT: ("replicas",),
    BATCH_JOB: ("suspend",),
    POD: ("nodeName",),
    AUTOSCALER: (),
}
"""Fields of a spec that are read; the rest of a cluster's pods is not kept."""
REMEMBERED = 10_000
Stored = Any  # an InferenceEndpoint, a FinetuneJob, one of them that cannot be read, or a Manifest, by kind


@dataclass(frozen=True)
class UnreadableObject:
    """An endpoint or a job that this version cannot read: it keeps its place, and nothing is done about it.

    Args:
        endpoint: the name of its group, empty where that cannot be read either.
        fault: which field, and why.
        status: as it is.
    """

    kind: Kind
    metadata: ObjectMeta
    endpoint: str
    fault: str
    status: Manifest


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
    unreadable: tuple[UnreadableObject, ...] = ()
    """The endpoint, or jobs."""


class Cache:
    """A cache of watched objects that never goes back to an older version."""

    def __init__(self) -> None:
        self._shelves = {kind: _Shelf() for kind in WATCHED}
        self._gone: OrderedDict[str, None] = OrderedDict()
        """Uids of the objects that went last: an answer that comes late does not bring one back."""

    def put(self, kind: Kind, body: Manifest) -> set[Name]:
        """Remember an object; return the groups that it touches, none when it is not newer than what is known."""
        shelf, name = self._shelves[kind], _name(body)
        version = int(body["metadata"].get("resourceVersion") or 0)
        if version <= shelf.versions.get(name, -1) or body["metadata"].get("uid") in self._gone:
            return set()
        stored = _parse(kind, body)
        before = shelf.group_of.get(name)
        touched = self._take_out(shelf, name)
        shelf.objects[name], shelf.versions[name] = stored, version
        group = _group_of(kind, stored)
        if group is None and isinstance(stored, UnreadableObject):
            group = before
        if group is not None:
            shelf.group_of[name] = group
            shelf.members.setdefault(group, set()).add(name)
            touched.add(group)
        return touched

    def remove(self, kind: Kind, name: Name, uid: str = "") -> set[Name]:
        """Forget an object that is gone, of that uid if one is given; return the groups that it belonged to."""
        shelf = self._shelves[kind]
        there = _uid(shelf.objects.get(name))
        for each in {uid, there if not uid else ""} - {""}:
            self._gone[each] = None
        while len(self._gone) > REMEMBERED:
            self._gone.popitem(last=False)
        if uid and there != uid:
            return set()
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
        """Return all endpoints that can be read."""
        found = self._shelves[ENDPOINT].objects.values()
        return [each for each in found if not isinstance(each, UnreadableObject)]

    def namespaces(self) -> set[str]:
        """Return those with endpoints, also ones that cannot be read."""
        return {namespace for namespace, _ in self._shelves[ENDPOINT].objects}

    def deployments(self) -> Iterable[Manifest]:
        """Return all Deployments of ours: the agents' of all endpoints, and those of tenants' Redis."""
        return self._shelves[DEPLOYMENT].objects.values()

    def feeders(self) -> Iterable[Manifest]:
        """Return the feeders of all groups."""
        return self._shelves[BATCH_JOB].objects.values()

    def group(self, name: Name) -> Group:
        """Return the group of the endpoint with this name."""
        ours = [*self._members(ENDPOINT, name), *self._members(FINETUNE_JOB, name)]
        unreadable = tuple(each for each in ours if isinstance(each, UnreadableObject))
        endpoint = self._shelves[ENDPOINT].objects.get(name)
        feeders = self._members(BATCH_JOB, name)
        pods = self._members(POD, name)
        feeder_pods: dict[str, tuple[Manifest, ...]] = {}
        for pod in pods:
            labels = pod["metadata"]["labels"]
            if labels.get(APP) == FEEDER_APP:
                job = labels.get(JOB_LABEL, "")
                feeder_pods[job] = (*feeder_pods.get(job, ()), pod)
        return Group(
            endpoint=None if isinstance(endpoint, UnreadableObject) else endpoint,
            jobs=tuple(each for each in self._members(FINETUNE_JOB, name) if not isinstance(each, UnreadableObject)),
            deployment=self._shelves[DEPLOYMENT].objects.get(name),
            autoscaler=self._shelves[AUTOSCALER].objects.get(name),
            pods=tuple(pod for pod in pods if pod["metadata"]["labels"].get(APP) != FEEDER_APP),
            feeders={feeder["metadata"]["labels"].get(JOB_LABEL, ""): feeder for feeder in feeders},
            feeder_pods=feeder_pods,
            fed_jobs=frozenset(
                pod["metadata"]["labels"].get(JOB_UID_LABEL, "") for found in feeder_pods.values() for pod in found
            ),
            unreadable=unreadable,
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


def _uid(stored: Stored | None) -> str:
    if stored is None:
        return ""
    return str(stored["metadata"].get("uid", "") if isinstance(stored, dict) else stored.metadata.uid)


def _parse(kind: Kind, body: Manifest) -> Stored:
    try:
        if kind is ENDPOINT:
            return InferenceEndpoint.from_dict(body)
        if kind is FINETUNE_JOB:
            return FinetuneJob.from_dict(body)
    except ValidationError as error:
        logger.error("%s %s cannot be read and is left alone: %s", kind.name, "/".join(_name(body)), error)
        return _unreadable(kind, body, error)
    return project(kind, body)


def project(kind: Kind, body: Manifest) -> Manifest:
    """Return what is read of an object of somebody else's kind."""
    metadata, spec = body["metadata"], body.get("spec") or {}
    return {
        "metadata": {key: metadata[key] for key in READ_METADATA if key in metadata},
        "spec": {key: spec[key] for key in READ_SPEC[kind] if key in spec},
        "status": body.get("status") or {},
    }


def _unreadable(kind: Kind, body: Manifest, error: ValidationError) -> UnreadableObject:
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    fault = f"{field} is {str(first['input'])[:200]}: {first['msg']}; this version of the operator cannot read it"
    reference = (body.get("spec") or {}).get("endpointRef")
    named = reference.get("name") if isinstance(reference, dict) else None
    endpoint = body["metadata"]["name"] if kind is ENDPOINT else named
    status = body.get("status") or {}
    return UnreadableObject(kind, ObjectMeta.model_validate(body["metadata"]), str(endpoint or ""), fault, status)


def _group_of(kind: Kind, stored: Stored) -> Name | None:
    if isinstance(stored, UnreadableObject):
        return (stored.metadata.namespace, stored.endpoint) if stored.endpoint else None
    if kind is ENDPOINT:
        return stored.metadata.namespace, stored.metadata.name
    if kind is FINETUNE_JOB:
        return stored.metadata.namespace, stored.spec.endpoint_ref.name
    metadata = stored["metadata"]
    endpoint = (metadata.get("labels") or {}).get(ENDPOINT_LABEL)
    return None if endpoint is None else (metadata["namespace"], endpoint)
