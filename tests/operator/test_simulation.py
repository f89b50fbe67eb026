"""The whole controller against a cluster and a Redis made of dictionaries, with faults at any moment.

The invariants are those of the design: no agent has two jobs, epochs only grow, what is over stays over, lost agents
are counted and nothing else is; and when the faults end, every job that can go on goes on.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Coroutine
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from coserve_api.job import FailedReason
from coserve_api.messages import Completed, Failed, FeedStatus, Released
from coserve_api.scripts import Fence, Reason, Refused
from coserve_api.store import JobRecord
from coserve_operator.apply import Applier
from coserve_operator.budget import StatusBudget
from coserve_operator.controller import Controller, ReconcileError
from coserve_operator.events import Recorder
from coserve_operator.kube import DEPLOYMENT, ENDPOINT, FINETUNE_JOB, KINDS, POD, ConflictError, NotFoundError
from coserve_operator.reconcile.job import Bind, Forget, Unbind
from coserve_operator.reconcile.observed import RedisView
from coserve_operator.settings import Settings
from coserve_operator.store import StoreError
from coserve_operator.world import WATCHED, World

NAMESPACE, GROUP = "ml", ("ml", "tiny")


def finish(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine that never has to wait."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("a fake made somebody wait")


class FakeKube:
    """Objects by kind and name; every write has a new resourceVersion and reaches the world as a watch event would."""

    def __init__(self, world: World) -> None:
        self.world, self.objects, self.version, self.events = world, {}, 0, []

    def put(self, body: dict[str, Any]) -> dict[str, Any]:
        self.version += 1
        body = copy.deepcopy(body)
        body["metadata"]["resourceVersion"] = str(self.version)
        body["metadata"].setdefault("uid", f"u-{self.version}")
        self.objects[body["kind"], body["metadata"]["name"]] = body
        if KINDS[body["kind"]] in WATCHED:
            self.world.put(KINDS[body["kind"]], body)
        return body

    def drop(self, kind: str, name: str) -> None:
        if self.objects.pop((kind, name), None) is not None and KINDS[kind] in WATCHED:
            self.world.remove(KINDS[kind], (NAMESPACE, name))

    async def get(self, kind: Any, _: str, name: str) -> dict[str, Any]:
        if (kind.name, name) not in self.objects:
            raise NotFoundError(404, name)
        return self.objects[kind.name, name]

    async def create(self, body: dict[str, Any]) -> dict[str, Any]:
        if body["kind"] == "Event":
            self.events.append((body["involvedObject"]["name"], body["reason"]))
            return body
        if (body["kind"], body["metadata"]["name"]) in self.objects:
            raise ConflictError(409, "exists")
        return self.put(body)

    async def apply(self, body: dict[str, Any], subresource: str | None = None) -> dict[str, Any]:
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

    async def delete(self, kind: Any, _: str, name: str, uid: str | None = None) -> None:
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

    def credentials(self, uid: str) -> tuple[str, str]:
        return f"cs-{uid}", "password"

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


class Machine(RuleBasedStateMachine):
    """One endpoint, a few jobs, and everything that can happen to them."""

    make: Any = None
    jobs = Bundle("jobs")

    @initialize(replicas=st.integers(1, 3))
    def begin(self, replicas: int) -> None:
        self.world = World()
        self.kube, self.store = FakeKube(self.world), FakeStore(self.make)
        self.clock = [0.0]
        self.operator()
        self.names: list[str] = []
        self.kube.put(self.make.endpoint_body(replicas=replicas))
        self.final: dict[str, Any] = {}
        self.epochs: dict[str, int] = {}
        self.boots = 0

    def operator(self) -> None:
        """A new operator process: it remembers nothing."""
        clock = lambda: self.clock[0]  # noqa: E731
        self.controller = Controller(
            Settings(), self.kube, self.store, self.world, Applier(self.kube, clock), StatusBudget(clock),
            Recorder(self.kube, "test"), lambda: datetime(2026, 11, 21, 12, tzinfo=UTC) + timedelta(seconds=clock()),
        )  # fmt: skip

    # ---- the world turns ----

    def pods(self) -> None:
        """The Deployment's controller, scheduler and kubelet at once."""
        deployment = self.kube.objects.get(("Deployment", "tiny"))
        wanted = deployment["spec"]["replicas"] if deployment else 0
        alive = [body for (kind, _), body in self.kube.objects.items() if kind == "Pod"]
        cost = "controller.kubernetes.io/pod-deletion-cost"
        alive.sort(key=lambda pod: int(pod["metadata"].get("annotations", {}).get(cost, 0)))
        for pod in alive[: max(0, len(alive) - wanted)]:
            self._end(pod["metadata"]["name"])
        for _ in range(wanted - len(alive)):
            self.boots += 1
            name = f"p{self.boots}"
            labels = {"app.kubernetes.io/name": "coserve-agent", "coserve.dev/endpoint": "tiny"}
            self.kube.put({
                "kind": "Pod",
                "metadata": {"name": name, "namespace": NAMESPACE, "uid": f"uid-{name}", "labels": labels},
                "spec": {"nodeName": "node-1"}, "status": {"conditions": [{"type": "Ready", "status": "True"}]},
            })  # fmt: skip
            self.store.agents[self.make.agent_of(name)] = self.make.heartbeat(name)
        if deployment is not None:
            count = len([1 for kind, _ in self.kube.objects if kind == "Pod"])
            status = {"replicas": count, "readyReplicas": count}
            if deployment.get("status") != status:
                self.kube.put(deployment | {"status": status})

    def _end(self, pod: str) -> None:
        self.kube.drop("Pod", pod)
        for agent in [each for each, beat in self.store.agents.items() if beat.pod_name == pod]:
            del self.store.agents[agent]

    def agents(self) -> None:
        """Agents do what they are told, and write only what the fence allows."""
        for agent, beat in list(self.store.agents.items()):
            running = {}
            for job, fence in self.store.fences.items():
                binding = self.store.bindings.get(job)
                over = isinstance(self.store.results.get(job), Completed | Failed | Released)
                if fence.agent != agent or binding is None or over:
                    continue
                if binding.desired == "Stop":
                    self.store.results[job] = Released(epoch=fence.epoch, step=0)
                    continue
                step = beat.jobs[job].step + 1 if job in beat.jobs else 0
                running[job] = (fence.epoch, step)
            adapters = {name: record.number for name, record in self.store.published.items()}
            self.store.agents[agent] = self.make.heartbeat(
                beat.pod_name, boot=beat.boot_id, ready=beat.ready, jobs=running, adapters=adapters
            )

    def reconcile(self) -> None:
        self.clock[0] += 1.0
        with contextlib.suppress(ReconcileError):
            finish(self.controller.reconcile(GROUP))

    # ---- what may happen ----

    @rule(target=jobs, shared=st.booleans())
    def create(self, shared: bool) -> str:
        number = len(self.names) + 1
        name = f"job-{number}"
        adapter = {"name": "shared" if shared else f"adapter-{number}"}
        self.kube.put(self.make.job_body(name, number=number, adapter=adapter, backoffLimit=2))
        self.names.append(name)
        return name

    @rule()
    def turn(self) -> None:
        self.pods()
        self.reconcile()
        self.agents()

    @rule(operations=st.integers(0, 4))
    def reconcile_while_redis_fails(self, operations: int) -> None:
        self.store.fail_after = operations
        self.reconcile()
        self.store.fail_after = None

    @rule(job=jobs)
    def feed(self, job: str) -> None:
        body = self.kube.objects.get(("FinetuneJob", job))
        if body is not None:
            self.store.feeds[body["metadata"]["uid"]] = FeedStatus(total_steps=10)

    def _running(self, job: str) -> tuple[str, Fence] | None:
        body = self.kube.objects.get(("FinetuneJob", job))
        fence = self.store.fences.get(body["metadata"]["uid"]) if body else None
        alive = fence is not None and fence.agent in self.store.agents
        return (body["metadata"]["uid"], fence) if alive else None

    @rule(job=jobs, step=st.integers(1, 9))
    def save(self, job: str, step: int) -> None:
        if (running := self._running(job)) is not None:
            uid, fence = running
            held = self.store.checkpoints.get(uid)
            if held is None or held.step < step:
                self.store.checkpoints[uid] = self.make.checkpoint(step, fence.epoch, uid)

    @rule(job=jobs, well=st.booleans())
    def end(self, job: str, well: bool) -> None:
        if (running := self._running(job)) is not None and running[0] not in self.store.results:
            uid, fence = running
            adapter = self.kube.objects["FinetuneJob", job]["spec"]["adapter"]["name"]
            number = self.store.bindings[uid].spec.adapter_number if uid in self.store.bindings else 1
            self.store.results[uid] = (
                self.make.completed(adapter, fence.epoch, number=number)
                if well
                else Failed(epoch=fence.epoch, reason=FailedReason.TRAINING_DIVERGED, message="nan")
            )

    @rule(job=jobs, suspend=st.booleans())
    def suspend(self, job: str, suspend: bool) -> None:
        body = self.kube.objects.get(("FinetuneJob", job))
        if body is not None:
            self.kube.put(body | {"spec": body["spec"] | {"suspend": suspend}})

    @rule(job=consumes(jobs))
    def delete(self, job: str) -> None:
        self.kube.drop("FinetuneJob", job)

    @rule(replicas=st.integers(0, 3))
    def scale(self, replicas: int) -> None:
        body = self.kube.objects["InferenceEndpoint", "tiny"]
        self.kube.put(body | {"spec": body["spec"] | {"replicas": replicas}})

    @rule(index=st.integers(0, 2))
    def restart_a_container(self, index: int) -> None:
        agents = sorted(self.store.agents)
        if index < len(agents):
            beat = self.store.agents.pop(agents[index])
            self.boots += 1
            boot = f"b{self.boots}"
            self.store.agents[self.make.agent_of(beat.pod_name, boot)] = self.make.heartbeat(beat.pod_name, boot=boot)

    @rule()
    def empty_redis(self) -> None:
        self.store.clear()

    @rule(settled=st.booleans())
    def doubt(self, settled: bool) -> None:
        self.store.settled = settled

    @rule()
    def restart_the_operator(self) -> None:
        self.operator()

    # ---- what must hold ----

    @invariant()
    def no_agent_has_two_jobs(self) -> None:
        holders = [fence.agent for fence in self.store.fences.values() if fence.agent in self.store.agents]
        assert len(holders) == len(set(holders)), self.store.fences

    @invariant()
    def statuses_only_go_forward(self) -> None:
        for (kind, name), body in self.kube.objects.items():
            if kind != "FinetuneJob":
                continue
            status = body.get("status", {})
            epoch = (status.get("binding") or {}).get("epoch", 0)
            assert epoch >= self.epochs.get(name, 0)
            self.epochs[name] = epoch
            assert status.get("restarts", 0) <= body["spec"]["backoffLimit"] + 1
            if name in self.final:
                assert status == self.final[name], "what is over must stay as it is"
            elif status.get("state") in ("Complete", "Failed"):
                self.final[name] = status

    def teardown(self) -> None:
        """When the faults end, everything that can go on goes on."""
        if not hasattr(self, "store"):
            return
        self.store.settled = True
        for name in self.names:
            self.feed(name)
        for _ in range(40):
            self.clock[0] += 30.0
            for name in self.names:
                self.feed(name)
            self.pods()
            self.reconcile()
            self.agents()
        bodies = [body for (kind, _), body in self.kube.objects.items() if kind == "FinetuneJob"]
        living = [body for body in bodies if body["status"]["state"] not in ("Complete", "Failed")]
        eager = [body for body in living if not body["spec"].get("suspend")]
        running = [
            body for body in eager if body["status"]["state"] == "Running" and body["status"]["reason"] == "Training"
        ]
        publishing = [body for body in living if body["status"].get("reason") == "Publishing"]
        agents = self.kube.objects["InferenceEndpoint", "tiny"]["spec"]["replicas"]
        assert len(self.store.agents) == agents
        assert len(running) == min(agents, len(eager) - len([1 for body in publishing if body in eager]))
        assert agents == 0 or not publishing
        for body in living:
            if body["spec"].get("suspend") and body not in publishing:
                assert body["status"]["state"] == "Suspended"
        assert self.store.known == {body["metadata"]["uid"] for body in living}
        assert self.store.incarnation is not None
        names = [body["spec"]["adapter"]["name"] for body in eager if body["status"].get("startTime")]
        assert len(names) == len(set(names)), "two living jobs train the same name"


def test_any_order_of_faults(make) -> None:
    Machine.make = make
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


_ = (DEPLOYMENT, ENDPOINT, FINETUNE_JOB, POD)
