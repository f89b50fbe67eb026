"""A cluster and a Redis made of dictionaries, where any call can fail."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from coserve_contract.messages import Completed, Failed
from coserve_contract.scripts import Fence, Reason, Refused
from coserve_contract.store import JobRecord
from coserve_operator.decide.actions import Bind, Forget, Unbind
from coserve_operator.decide.observed import RedisView
from coserve_operator.kube import KINDS, ConflictError, NotFoundError, UnavailableError
from coserve_operator.redis.store import StoreError
from coserve_operator.tenants import RedisAccess
from coserve_operator.watch.cache import WATCHED, Cache

NAMESPACE = "ml"


class FakeKube:
    """Objects by kind and name; every write has a new resourceVersion and reaches the cache as a watch event would."""

    def __init__(self, cache: Cache) -> None:
        self.cache, self.objects, self.version, self.events = cache, {}, 0, []
        self.away = False

    def _call(self) -> None:
        if self.away:
            raise UnavailableError(0, "the API server is away")

    def put(self, body: dict[str, Any]) -> dict[str, Any]:
        self.version += 1
        body = copy.deepcopy(body)
        body["metadata"]["resourceVersion"] = str(self.version)
        body["metadata"].setdefault("uid", f"u-{self.version}")
        self.objects[body["kind"], body["metadata"]["name"]] = body
        if KINDS[body["kind"]] in WATCHED:
            self.cache.put(KINDS[body["kind"]], body)
        return body

    def drop(self, kind: str, name: str) -> None:
        if self.objects.pop((kind, name), None) is not None and KINDS[kind] in WATCHED:
            self.cache.remove(KINDS[kind], (NAMESPACE, name))

    async def get(self, kind: Any, _: str, name: str) -> dict[str, Any]:
        self._call()
        if (kind.name, name) not in self.objects:
            raise NotFoundError(404, name)
        return self.objects[kind.name, name]

    async def create(self, body: dict[str, Any]) -> dict[str, Any]:
        self._call()
        if body["kind"] == "Event":
            self.events.append((body["involvedObject"]["name"], body["reason"]))
            return body
        if (body["kind"], body["metadata"]["name"]) in self.objects:
            raise ConflictError(409, "exists")
        return self.put(body)

    async def apply(self, body: dict[str, Any], subresource: str | None = None) -> dict[str, Any]:
        self._call()
        key = body["kind"], body["metadata"]["name"]
        found = self.objects.get(key)
        if subresource == "status":
            if found is None:
                raise NotFoundError(404, key[1])
            if body["metadata"]["resourceVersion"] != found["metadata"]["resourceVersion"]:
                raise ConflictError(409, "changed")
            return self.put(found | {"status": body["status"]})
        if found is not None:
            body = body | {"metadata": found["metadata"] | body["metadata"], "status": found.get("status", {})}
        return self.put(body)

    async def merge(self, kind: Any, _: str, name: str, patch: dict[str, Any]) -> dict[str, Any]:
        found = copy.deepcopy(await self.get(kind, _, name))
        for part, values in patch.items():
            if part == "metadata":
                annotations = found["metadata"].setdefault("annotations", {})
                for key, value in values["annotations"].items():
                    annotations.pop(key, None) if value is None else annotations.update({key: value})
            else:
                found[part] = found.get(part, {}) | values
        return self.put(found)

    async def events_of(self, *_: str) -> list[Any]:
        return []

    async def delete(self, kind: Any, _: str, name: str, uid: str | None = None, version: str | None = None) -> None:
        self._call()
        self.drop(kind.name, name)


class FakeStore:
    """What the scripts of coserve_api do, with dictionaries; `fail_after` operations it cannot be reached."""

    def __init__(self, make: Any) -> None:
        self.make, self.fail_after = make, None
        self.agents, self.settled = {}, True
        self.highest_epoch: dict[str, int] = {}
        self.clear()

    def clear(self) -> None:
        self.incarnation, self.fences, self.bindings = None, {}, {}
        self.results, self.feeds, self.checkpoints, self.known, self.published = {}, {}, {}, set(), {}

    def of(self, _: str) -> FakeStore:
        return self

    def access(self, _: str, uid: str) -> RedisAccess:
        return RedisAccess("redis://r:6379/0", f"cs-{uid}", "password", digest="digest")

    def reference(self) -> RedisAccess:
        return self.access("", "reference")

    def _step(self) -> None:
        if self.fail_after is not None:
            self.fail_after -= 1
            if self.fail_after < 0:
                raise StoreError("Redis: away")

    async def assert_user(self, _: str) -> None:
        self._step()

    async def read(self, wants: dict[str, list[str]]) -> dict[str, RedisView]:
        self._step()
        ((uid, jobs),) = wants.items()
        records = {
            job: JobRecord(
                fence=self.fences.get(job),
                result=self.results.get(job),
                feed=self.feeds.get(job),
                checkpoint=self.checkpoints.get(job),
            )
            for job in jobs
        }
        return {
            uid: RedisView(
                self.incarnation, dict(self.agents), records, dict(self.bindings), frozenset(self.known),
                dict(self.published), settled=self.settled,
            )
        }  # fmt: skip

    async def do(self, _: str, action: Any) -> Refused | None:
        self._step()
        job = action.job_uid
        fence = self.fences.get(job)
        if isinstance(action, Forget):
            for kept in (self.fences, self.bindings, self.results, self.feeds, self.checkpoints):
                kept.pop(job, None)
            self.known.discard(job)
        elif isinstance(action, Bind):
            if fence is not None and fence.epoch >= action.binding.epoch:
                return Refused(Reason.STALE_EPOCH, fence.epoch)
            if isinstance(self.results.get(job), Completed | Failed):
                return Refused(Reason.FINISHED)
            self.known.add(job)
            self.fences[job] = Fence(action.binding.epoch, action.agent)
            self.bindings[job] = action.binding
            self.results.pop(job, None)
            resume = action.binding.resume
            held = self.checkpoints.get(job)
            if resume is not None and (held is None or held.step < resume.step):
                self.checkpoints[job] = resume
            assert action.binding.epoch >= self.highest_epoch.get(job, 0), "an epoch went back"
            self.highest_epoch[job] = action.binding.epoch
        elif isinstance(action, Unbind):
            if fence is None or fence.epoch != action.epoch:
                return Refused(Reason.STALE_EPOCH)
            self.fences[job] = replace(fence, agent="")
            self.bindings.pop(job, None)
        else:
            if fence != Fence(action.binding.epoch, action.agent):
                return Refused(Reason.NOT_OWNER)
            self.bindings[job] = action.binding
        return None

    async def register(self, _: str, jobs: list[str]) -> None:
        self._step()
        self.known |= set(jobs)

    async def sweep_agents(self, _: str) -> None:
        self._step()

    async def set_adapters(self, _: str, records: Any) -> None:
        self._step()
        self.published = {record.name: record for record in records}

    async def begin(self, _: str) -> None:
        self._step()
        self.incarnation = "i"
