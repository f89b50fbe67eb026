"""Agents and feeders, all in this process: they write to Redis what real ones do, by the same scripts."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from kubernetes.aio.client import BatchV1Api
from kubernetes.aio.watch import Watch
from redis.asyncio import Redis

from coserve_contract.keys import Keys, agent_id
from coserve_contract.messages import Binding, Checkpoint, Completed, FeedStatus, Heartbeat, JobBeat, Load, Progress
from coserve_contract.scripts import Fencing, Lease
from coserve_contract.store import Store
from coserve_operator.kube import BATCH_JOB, KubeError

from .objects import all_of
from .servers import NAMESPACE, Servers, api_client, client

STEPS = 1_000_000
SHA = "0" * 64
RENEW_EVERY, SAVE_EVERY = 4, 60
"""Seconds."""


class Together:
    """A Redis client for the agents: what many ask at the same moment goes in one round trip, which costs this process
    less than a round trip each.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._asked: list[tuple[tuple[Any, ...], asyncio.Future[Any]]] = []

    async def execute_command(self, *words: Any) -> Any:
        answer = asyncio.get_running_loop().create_future()
        if not self._asked:
            asyncio.get_running_loop().call_soon(lambda: asyncio.ensure_future(self._ask()))
        self._asked.append((words, answer))
        return await answer

    async def _ask(self) -> None:
        asked, self._asked = self._asked, []
        pipeline = self._redis.pipeline(transaction=False)
        for words, _ in asked:
            pipeline.execute_command(*words)  # type: ignore[no-untyped-call]
        said = await pipeline.execute(raise_on_error=False)
        for (_, answer), each in zip(asked, said, strict=True):
            if answer.cancelled():
                continue
            answer.set_exception(each) if isinstance(each, Exception) else answer.set_result(each)


@dataclass
class Agent:
    """One agent of one endpoint, with as many places as it has jobs to run."""

    redis: Any
    uid: str
    places: int
    number: int
    held: dict[str, Binding] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pod, keys = f"agent-{self.number}", Keys(self.uid)
        self.id = agent_id(f"pod-{self.number}", "b1")
        self.fencing, self.store = Fencing(self.redis, keys, self.id), Store(self.redis, keys)
        self.seconds, self.began, self.longest_s = 0, 0.0, 0.0

    async def second(self, progress_every: int) -> None:
        """What an agent does each second."""
        now = asyncio.get_running_loop().time()
        self.longest_s, self.began = max(self.longest_s, now - self.began if self.began else 0.0), now
        self.seconds += 1
        running = {job: JobBeat(epoch=each.epoch, step=self.seconds) for job, each in self.held.items()}
        beat = Heartbeat(
            agent_id=self.id, pod_name=self.pod, pod_uid=f"pod-{self.number}", boot_id="b1", node="node-1", ready=True,
            max_jobs=self.places, jobs=running, load=Load(saturation_percent=(self.number + self.seconds) % 100),
        )  # fmt: skip
        incarnation = await self.fencing.heartbeat(beat)
        if incarnation != self.fencing.incarnation:
            self.fencing.register(incarnation)
        told, _ = await self.store.bindings(self.id)
        for job, binding in told.items():
            known = self.held.get(job)
            mine = known is not None and known.epoch == binding.epoch
            if mine or isinstance(await self.fencing.take_lease(job, binding.epoch), Lease):
                self.held[job] = binding
        for job in self.held.keys() - told.keys():
            del self.held[job]
        for place, (job, binding) in enumerate(list(self.held.items())):  # one may end meanwhile
            await self._job(job, binding.epoch, self.seconds + self.number + place, progress_every)

    async def _job(self, job: str, epoch: int, turn: int, progress_every: int) -> None:
        step = self.seconds
        if turn % RENEW_EVERY == 0:
            await self.fencing.renew_lease(job, epoch)
        if turn % progress_every == 0:
            report = Progress(epoch=epoch, step=step, cursor=step, eval_cursor=0, total_steps=STEPS, loss=1.0)
            await self.fencing.report_progress(job, report)
        if turn % SAVE_EVERY == 0:
            path = f"jobs/{job}/e{epoch}/s{step}"
            saved = Checkpoint(step=step, cursor=step, epoch=epoch, path=path, sha256=SHA)
            await self.fencing.accept_checkpoint(job, epoch, saved)

    async def end(self, job: str) -> None:
        """The job is trained, and nothing is published."""
        epoch = self.held.pop(job).epoch
        await self.fencing.finish(job, Completed(epoch=epoch, step=self.seconds, tokens=1))


async def play(agents: list[Agent], progress_every: int) -> None:
    """All agents, each once a second as far as one process can."""
    while True:
        begun = asyncio.get_running_loop().time()
        await all_of([lambda each=each: each.second(progress_every) for each in agents], at_once=500)
        left_s = begun + 1.0 - asyncio.get_running_loop().time()
        await asyncio.sleep(max(0.0, left_s))


async def say_data_ready(redis: Redis, jobs: dict[str, str]) -> None:
    """The feeders of all jobs (uid -> the endpoint's uid) have read their data."""
    status = FeedStatus(total_steps=STEPS, samples=STEPS, finished=True)
    await all_of([lambda j=job, e=uid: Store(redis, Keys(e)).set_feed(j, status) for job, uid in jobs.items()], 32)


async def run_feeders(at: Servers) -> None:
    """Play the Job controller: each feeder has a pod."""
    body: dict[str, Any] = {"apiVersion": BATCH_JOB.api_version, "kind": BATCH_JOB.name}
    kube = await client(at)
    async with await api_client(at) as api:
        async for event in Watch(return_type=object).stream(BatchV1Api(api).list_job_for_all_namespaces):
            told = event["object"]
            if event["type"] == "DELETED" or told["spec"].get("suspend") or told.get("status", {}).get("active"):
                continue
            status = {"active": 1, "ready": 1, "startTime": told["metadata"]["creationTimestamp"]}
            played = body | {"metadata": {"name": told["metadata"]["name"], "namespace": NAMESPACE}, "status": status}
            with suppress(KubeError):
                await kube.apply(played, "status", "bench")
