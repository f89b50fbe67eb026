"""What the watches have shown: the newest version of each object, and which group of objects belongs together.

A group is an endpoint with its jobs: they are decided on together, so that no two jobs are given the same agent. What
is asked of all objects of a kind is kept as an index, for a pass over one group must not cost what all groups do.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import ValidationError

from coserve_api.common import ObjectMeta
from coserve_api.endpoint import InferenceEndpoint
from coserve_api.job import FinetuneJob
from coserve_operator.decide.finished import Finished, FinishedJob, finished
from coserve_operator.decide.stores import Folders
from coserve_operator.kube import AUTOSCALER, BATCH_JOB, DEPLOYMENT, ENDPOINT, FINETUNE_JOB, POD, Kind, Manifest
from coserve_operator.manifests.feeder import feeder_name
from coserve_operator.manifests.metadata import APP, ENDPOINT_LABEL, FEEDER_APP, JOB_LABEL, JOB_UID_LABEL
from coserve_operator.watch.slim import slim
from coserve_operator.watch.views import feeder_view, rollout_view

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
K = TypeVar("K")
Stored = Any  # an InferenceEndpoint, a FinetuneJob, a FinishedJob, one that cannot be read, or a Manifest, by kind


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
    """Objects of one kind, with the groups that they belong to. `members` of a group are those that each pass looks at:
    neither jobs that are over, nor feeders that rest, nor feeders' pods, which are found by their job.
    """

    objects: dict[Name, Stored] = field(default_factory=dict)
    versions: dict[Name, int] = field(default_factory=dict)
    members: dict[Name, set[Name]] = field(default_factory=dict)
    group_of: dict[Name, Name] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """An endpoint, which may be missing, and what belongs to it."""

    endpoint: InferenceEndpoint | None
    jobs: tuple[FinetuneJob, ...]
    """Those that are not over, or have yet to say so."""
    finished: Finished
    """The others."""
    deployment: Manifest | None
    autoscaler: Manifest | None
    pods: tuple[Manifest, ...]
    feeders: dict[str, Manifest]
    feeder_pods: dict[str, tuple[Manifest, ...]]
    """Feeders and their pods by the name of the job."""
    left_feeders: dict[str, Manifest]
    """Feeders that run, of jobs that are over or gone."""
    unreadable: tuple[UnreadableObject, ...] = ()
    """The endpoint, or jobs."""


class Cache:
    """A cache of watched objects that never goes back to an older version."""

    def __init__(self) -> None:
        self._shelves = {kind: _Shelf() for kind in WATCHED}
        self._gone: OrderedDict[str, None] = OrderedDict()
        """Uids of the objects that went last: an answer that comes late does not bring one back."""
        self._finished: dict[Name, Finished] = {}
        self._folders = Folders()
        self._feeder_pods: dict[tuple[str, str], set[Name]] = {}
        """Feeders' pods by namespace and name of the job."""
        self._writers: dict[str, set[Name]] = {}
        """Feeders' pods that have not ended, by the job's uid."""
        self._checking: set[Name] = set()
        self._rolling: set[Name] = set()

    def put(self, kind: Kind, body: Manifest) -> set[Name]:
        """Remember an object; return the groups that it touches, none when it is not newer than what is known."""
        shelf, name = self._shelves[kind], _name(body)
        version = int(body["metadata"].get("resourceVersion") or 0)
        if version <= shelf.versions.get(name, -1) or body["metadata"].get("uid") in self._gone:
            return set()
        stored = _parse(kind, body)
        before, old = shelf.group_of.get(name), shelf.objects.get(name)
        touched = self._take_out(kind, name)
        group = _group_of(kind, stored)
        if group is None and isinstance(stored, UnreadableObject):
            group = before
        over = finished(stored) if isinstance(stored, FinetuneJob) else None
        shelf.objects[name], shelf.versions[name] = over or stored, version
        if group is not None:
            shelf.group_of[name] = group
            if over is not None:
                self._finished.setdefault(group, Finished()).put(over)
            elif _is_looked_at(kind, stored):
                shelf.members.setdefault(group, set()).add(name)
            touched.add(group)
            self._index(kind, name, stored)
        if kind is ENDPOINT and name in self._finished and _has_lost(old, stored):
            self._finished[name].look_again()
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
        touched = self._take_out(kind, name)
        shelf.versions.pop(name, None)
        return touched

    def retain(self, kind: Kind, listed: Set[Name], version: int) -> set[Name]:
        """Take a full list as of `version`: what is older and not in it is gone. A watch may have missed deletions."""
        shelf = self._shelves[kind]
        touched: set[Name] = set()
        for name in shelf.objects.keys() - listed:
            if shelf.versions[name] <= version:
                touched |= self.remove(kind, name)
        return touched

    def groups(self) -> set[Name]:
        """Return all groups that have an endpoint or a job."""
        return {name for kind in (ENDPOINT, FINETUNE_JOB) for name in self._shelves[kind].members} | {*self._finished}

    def endpoints(self) -> Iterable[InferenceEndpoint]:
        """Return all endpoints that can be read."""
        found = self._shelves[ENDPOINT].objects.values()
        return [each for each in found if not isinstance(each, UnreadableObject)]

    def around(self, endpoint: InferenceEndpoint) -> list[InferenceEndpoint]:
        """Return the endpoints whose artifact store may lie inside this one's, or around it."""
        return self._folders.around(endpoint)

    def namespaces(self) -> set[str]:
        """Return those with endpoints, also ones that cannot be read."""
        return {namespace for namespace, _ in self._shelves[ENDPOINT].objects}

    def deployments(self) -> Iterable[Manifest]:
        """Return all Deployments of ours: the agents' of all endpoints, and those of tenants' Redis."""
        return self._shelves[DEPLOYMENT].objects.values()

    def rolling(self) -> int:
        """Return how many Deployments replace their agents for a new version of ours."""
        return len(self._rolling)

    def checking(self) -> int:
        """Return how many feeders check data."""
        return len(self._checking)

    def is_fed(self, job_uid: str) -> bool:
        """Return whether a feeder's pod works for the job, which may be gone."""
        return job_uid in self._writers

    def living(self, name: Name) -> list[str]:
        """Return the uids of the group's jobs that are not over."""
        shelf = self._shelves[FINETUNE_JOB]
        found = (shelf.objects[each] for each in shelf.members.get(name, ()))
        return [each.metadata.uid for each in found if isinstance(each, FinetuneJob)]

    def finished(self, name: Name) -> Finished:
        """Return the group's jobs that are over, as of now."""
        return self._finished.get(name) or Finished()

    def group(self, name: Name) -> Group:
        """Return the group of the endpoint with this name."""
        ours = [*self._members(ENDPOINT, name), *self._members(FINETUNE_JOB, name)]
        jobs = tuple(each for each in ours if isinstance(each, FinetuneJob))
        endpoint = self._shelves[ENDPOINT].objects.get(name)
        feeders, pods = self._shelves[BATCH_JOB].objects, self._shelves[POD].objects
        names = {job.metadata.name: (name[0], feeder_name(job.metadata.name)) for job in jobs}
        ran = {job: sorted(self._feeder_pods.get((name[0], job), ())) for job in names}
        at_work = {_label(each, JOB_LABEL): each for each in self._members(BATCH_JOB, name)}
        return Group(
            endpoint=None if isinstance(endpoint, UnreadableObject) else endpoint,
            jobs=jobs,
            finished=self.finished(name),
            deployment=self._shelves[DEPLOYMENT].objects.get(name),
            autoscaler=self._shelves[AUTOSCALER].objects.get(name),
            pods=tuple(self._members(POD, name)),
            feeders={job: feeders[each] for job, each in names.items() if each in feeders},
            feeder_pods={job: tuple(pods[each] for each in found) for job, found in ran.items() if found},
            left_feeders={job: each for job, each in at_work.items() if job not in names},
            unreadable=tuple(each for each in ours if isinstance(each, UnreadableObject)),
        )

    def _members(self, kind: Kind, group: Name) -> list[Stored]:
        shelf = self._shelves[kind]
        return [shelf.objects[name] for name in sorted(shelf.members.get(group, ()))]

    def _take_out(self, kind: Kind, name: Name) -> set[Name]:
        """Remove an object and return the groups that held it."""
        shelf = self._shelves[kind]
        stored, group = shelf.objects.pop(name, None), shelf.group_of.pop(name, None)
        if stored is not None:
            self._unindex(kind, name, stored)
        if group is None:
            return set()
        if isinstance(stored, FinishedJob):
            self._finished[group].remove(stored.name)
            if not self._finished[group].by_name:
                del self._finished[group]
        _discard(shelf.members, group, name)
        return {group}

    def _index(self, kind: Kind, name: Name, stored: Stored) -> None:
        if isinstance(stored, InferenceEndpoint):
            self._folders.put(stored)
        elif kind is BATCH_JOB and _is_checking(stored):
            self._checking.add(name)
        elif kind is DEPLOYMENT and _is_rolling(stored):
            self._rolling.add(name)
        elif kind is POD and _label(stored, APP) == FEEDER_APP:
            self._feeder_pods.setdefault((name[0], _label(stored, JOB_LABEL)), set()).add(name)
            if stored["status"].get("phase") not in ("Succeeded", "Failed"):
                self._writers.setdefault(_label(stored, JOB_UID_LABEL), set()).add(name)

    def _unindex(self, kind: Kind, name: Name, stored: Stored) -> None:
        if isinstance(stored, InferenceEndpoint):
            self._folders.remove(stored)
        self._checking.discard(name) if kind is BATCH_JOB else None
        self._rolling.discard(name) if kind is DEPLOYMENT else None
        if kind is POD and _label(stored, APP) == FEEDER_APP:
            _discard(self._feeder_pods, (name[0], _label(stored, JOB_LABEL)), name)
            _discard(self._writers, _label(stored, JOB_UID_LABEL), name)


def _has_lost(old: Stored, new: Stored) -> bool:
    """Return whether an endpoint may lack adapters in its status that it had."""
    if not isinstance(old, InferenceEndpoint) or not isinstance(new, InferenceEndpoint):
        return True
    kept = {each.name: each.version for each in new.status.adapters}
    same = old.metadata.uid == new.metadata.uid
    return not same or any(kept.get(each.name, 0) < each.version for each in old.status.adapters)


def _is_looked_at(kind: Kind, stored: Stored) -> bool:
    if kind is BATCH_JOB:
        view = feeder_view(stored, ())
        return not view.suspended and not view.finished
    return kind is not POD or _label(stored, APP) != FEEDER_APP


def _is_checking(feeder: Manifest) -> bool:
    view = feeder_view(feeder, ())
    return view.checks and not view.finished and not view.suspended


def _is_rolling(deployment: Manifest) -> bool:
    view = rollout_view(deployment)
    return view is not None and view.in_turn and not view.complete


def _discard(index: dict[K, set[Name]], key: K, name: Name) -> None:
    """Take a name out of an index, and with the last one the key."""
    index.get(key, set()).discard(name)
    if key in index and not index[key]:
        del index[key]


def _label(stored: Manifest, label: str) -> str:
    return str((stored["metadata"].get("labels") or {}).get(label, ""))


def _name(body: Manifest) -> Name:
    return body["metadata"]["namespace"], body["metadata"]["name"]


def _uid(stored: Stored | None) -> str:
    if stored is None:
        return ""
    if isinstance(stored, FinishedJob):
        return stored.uid
    return str(stored["metadata"].get("uid", "") if isinstance(stored, dict) else stored.metadata.uid)


def _parse(kind: Kind, body: Manifest) -> Stored:
    try:
        if kind is ENDPOINT:
            return slim(InferenceEndpoint.from_dict(body))
        if kind is FINETUNE_JOB:
            return slim(FinetuneJob.from_dict(body))
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
