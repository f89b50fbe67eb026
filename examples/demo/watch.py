"""What the agents did, iteration by iteration, read from their admin ports."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from demo.cluster import ENDPOINTS, JOBS, Agent, Cluster

TURN_S, OBJECTS_EVERY = 1.5, 3
"""Agents share their cores with whoever asks them."""


@dataclass
class AgentLog:
    """One agent's iterations; times are of its machine's monotonic clock."""

    agent: Agent
    iterations: list[dict[str, float]] = field(default_factory=list)
    now_s: float = 0.0

    def poll(self) -> None:
        since = self.iterations[-1]["started"] if self.iterations else 0.0
        reply = self.agent.get(f"/debug/iterations?since={since}")
        if reply:
            self.iterations += reply["iterations"]
            self.now_s = reply["now"]

    def requests(self, since_s: float) -> list[dict[str, Any]]:
        """Requests that arrived since then and have ended: where each token waited, and why a promise was missed."""
        reply = self.agent.get(f"/debug/requests?since={since_s}")
        return reply["requests"] if reply else []

    def finetune_tokens(self, since_s: float) -> float:
        """Tokens whose backward was done in iterations that began after `since_s`."""
        return sum(row["backward"] for row in self.iterations if row["started"] >= since_s)


@dataclass
class Watcher:
    """Polls agents and objects in threads, so that the replay's clock is not disturbed."""

    cluster: Cluster
    logs: list[AgentLog]
    endpoint_name: str
    job_name: str
    endpoint: dict[str, Any] = field(default_factory=dict)
    job: dict[str, Any] = field(default_factory=dict)
    losses: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=512))

    async def poll(self) -> None:
        """Read everything once."""
        await self.poll_agents()
        await self.poll_objects()

    async def poll_agents(self) -> None:
        """Read what the agents have done since the last time."""
        await asyncio.gather(*(asyncio.to_thread(log.poll) for log in self.logs))

    async def poll_objects(self) -> None:
        """Read the job and the endpoint."""
        self.job = await asyncio.to_thread(self.cluster.get, JOBS, self.job_name)
        self.endpoint = await asyncio.to_thread(self.cluster.get, ENDPOINTS, self.endpoint_name)
        progress = self.job.get("status", {}).get("progress", {})
        if "loss" in progress and (not self.losses or self.losses[-1][0] != progress["step"]):
            self.losses.append((progress["step"], float(progress["loss"])))

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop`: the agents at every turn, the objects at every third."""
        turn = 0
        while not stop.is_set():
            await self.poll_agents()
            if turn % OBJECTS_EVERY == 0:
                await self.poll_objects()
            turn += 1
            try:
                await asyncio.wait_for(stop.wait(), TURN_S)
            except TimeoutError:
                continue

    def mark(self) -> list[float]:
        """When each agent was last polled, on its clock."""
        return [log.now_s for log in self.logs]

    def finetune_tokens(self, marks: list[float]) -> float:
        return sum(log.finetune_tokens(mark) for log, mark in zip(self.logs, marks, strict=True))

    def mix(self, seconds: float) -> dict[str, float]:
        """Tokens a second of each kind over the last `seconds`, all agents together."""
        total = dict.fromkeys(("decode", "prefill", "finetune", "backward"), 0.0)
        for log in self.logs:
            for row in reversed(log.iterations):
                if row["started"] < log.now_s - seconds:
                    break
                for kind in total:
                    total[kind] += row[kind] / seconds
        return total


async def finetune_rate(watcher: Watcher, seconds: float) -> float:
    """Finetuning tokens a second over the next `seconds`."""
    await watcher.poll()
    marks, started = watcher.mark(), time.monotonic()
    await asyncio.sleep(seconds)
    await watcher.poll()
    return watcher.finetune_tokens(marks) / (time.monotonic() - started)
