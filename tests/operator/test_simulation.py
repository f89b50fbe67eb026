"""The whole controller against a cluster and a Redis made of dictionaries, with faults at any moment.

The invariants are those of the design: no agent has two jobs, epochs only grow, what is over stays over, lost agents
are counted and nothing else is; and when the faults end, every job that can go on goes on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Coroutine
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
from operator_fakes import FakeKube, FakeStore

from coserve_api.job_status import FailedReason, PendingReason
from coserve_contract.messages import Completed, Failed, FeedStatus, Released
from coserve_contract.scripts import Fence
from coserve_operator.apply.budget import StatusBudget
from coserve_operator.apply.events import Recorder
from coserve_operator.apply.metrics_slot import MetricsSlotKeeper
from coserve_operator.apply.objects import Applier
from coserve_operator.controller import Controller, ReconcileError
from coserve_operator.settings import Settings
from coserve_operator.watch.cache import Cache

NAMESPACE, GROUP = "ml", ("ml", "tiny")
OTHERS = ("Training", "Starting", "Suspending", "Suspended", "Moving", "Publishing", "Completed")
"""What a job's reason may be besides those of waiting and failing."""


def finish(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine that never has to wait."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("a fake made somebody wait")


class Machine(RuleBasedStateMachine):
    """One endpoint, a few jobs, and everything that can happen to them."""

    make: Any = None
    jobs = Bundle("jobs")

    @initialize(replicas=st.integers(1, 3))
    def begin(self, replicas: int) -> None:
        self.cache = Cache()
        self.kube, self.store = FakeKube(self.cache), FakeStore(self.make)
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
            Settings(), self.kube, self.store, self.cache, Applier(self.kube, clock), StatusBudget(clock),
            Recorder(self.kube, "test"), MetricsSlotKeeper(self.kube, ("ns", "metrics"), clock, lambda: None),
            lambda: datetime(2026, 11, 21, 12, tzinfo=UTC) + timedelta(seconds=clock()),
        )  # fmt: skip

    # ---- the cache turns ----

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

    @rule(job=jobs, reason=st.sampled_from([FailedReason.ARTIFACT_STORE_ERROR, FailedReason.INTERNAL_ERROR]))
    def give_back(self, job: str, reason: FailedReason) -> None:
        if (running := self._running(job)) is not None and running[0] not in self.store.results:
            uid, fence = running
            self.store.results[uid] = Released(epoch=fence.epoch, step=0, reason=reason, message="a fault")

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
            failures = (status.get("backoff") or {}).get("failures", 0)
            assert failures <= body["spec"]["backoffLimit"] + 1
            assert status.get("reason") in (None, *PendingReason, *OTHERS, FailedReason.TRAINING_DIVERGED) or (
                status["reason"] == FailedReason.BACKOFF_LIMIT_EXCEEDED and failures > body["spec"]["backoffLimit"]
            ), status
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
        held = [body for body in living if body["status"].get("reason") == "NameTaken"]
        for body in held:
            name = body["spec"]["adapter"]["name"]
            assert [each for each in living if each not in held and each["spec"]["adapter"]["name"] == name]
        eager = [body for body in living if not body["spec"].get("suspend") and body not in held]
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
        settings=settings(max_examples=120, stateful_step_count=40, suppress_health_check=list(HealthCheck)),
    )
