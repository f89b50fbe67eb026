"""The operator under load: `python -m bench.operator`, from the repository's root. Real kube-apiserver, etcd, Redis and
operator; agents and feeders are played. Prints JSON: milliseconds from a change to its reconciled effect, CPU seconds a
minute and memory of each program.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from coserve_contract.connect import connect as connect_redis
from coserve_operator.kube import FINETUNE_JOB, Kube, Manifest
from coserve_operator.process import first_of

from . import objects, players, servers

PATIENCE_S = 60.0
LOOK_S, SETTLED_S = 0.05, 15.0
"""How often it is looked whether a change has come about: no figure is finer; and whether all jobs are as they should.
"""


async def main(options: argparse.Namespace, folder: Path, at: servers.Servers) -> dict[str, Any]:
    kube, redis = await servers.client(at), connect_redis(at.redis[0], None, at.redis[1])
    places = -(-options.running // options.endpoints)
    made = await objects.create(kube, (objects.endpoint(n, places) for n in range(options.endpoints)))
    uids = [each["metadata"]["uid"] for each in made]
    await _finished(kube, options)
    count = options.running + options.queued
    named = (objects.job(f"job-{n:06d}", n, objects.endpoint_name(n % options.endpoints)) for n in range(count))
    jobs = await objects.create(kube, named)
    endpoint_of = {each["metadata"]["uid"]: uids[n % options.endpoints] for n, each in enumerate(jobs)}
    await players.say_data_ready(redis, endpoint_of)
    together = players.Together(redis)
    agents = [players.Agent(together, uid, places, number) for number, uid in enumerate(uids)]
    with servers.operator(folder, at, options.profile):
        told: dict[str, Any] = {}
        measured = _run(kube, agents, jobs, at, options, told)
        await first_of(measured, players.play(agents, options.progress_seconds), players.run_feeders(at))
    await redis.aclose()
    await kube.close()
    return told


async def _run(
    kube: Kube,
    agents: list[players.Agent],
    jobs: list[Manifest],
    at: servers.Servers,
    options: argparse.Namespace,
    told: dict[str, Any],
) -> None:
    begun = time.monotonic()
    await _until(lambda: _all_run(agents, options.running), options.settle_seconds)
    told["all run after s"] = round(time.monotonic() - begun, 1)
    await _until(lambda: _all_said(kube, options.running), options.settle_seconds, look_s=SETTLED_S)
    told["all are said to run after s"] = round(time.monotonic() - begun, 1)
    await asyncio.sleep(options.calm_seconds)
    told |= await _measure(kube, agents, jobs, at, options)


async def _finished(kube: Kube, options: argparse.Namespace) -> None:
    named = [
        objects.job(f"old-{n:06d}", n, objects.endpoint_name(n % options.endpoints)) for n in range(options.finished)
    ]
    made = await objects.create(kube, named)
    await objects.all_of([lambda each=each: kube.apply(objects.ended(each), "status") for each in made])


async def _all_run(agents: list[players.Agent], running: int) -> bool:
    return sum(len(each.held) for each in agents) >= running


async def _all_said(kube: Kube, running: int) -> bool:
    states = [each.get("status", {}).get("state") async for page, _ in kube.pages(FINETUNE_JOB) for each in page]
    return states.count("Running") >= running


async def _measure(
    kube: Kube, agents: list[players.Agent], jobs: list[Manifest], at: servers.Servers, options: argparse.Namespace
) -> dict[str, Any]:
    pids = servers.programs()
    before, begun = {name: servers.cpu_seconds(pid) for name, pid in pids.items()}, time.monotonic()
    calls = servers.api_calls(at)
    rng, names = random.Random(1), {each["metadata"]["uid"]: each["metadata"]["name"] for each in jobs}
    edits, results = [], []
    while time.monotonic() - begun < options.seconds:
        agent = rng.choice([each for each in agents if each.held])
        job = rng.choice(sorted(agent.held))
        edits.append(await _edit(kube, agent, job, names[job], rng))
        agent = rng.choice([each for each in agents if each.held])
        job = rng.choice(sorted(agent.held))
        results.append(await _end(kube, agent, job, names[job]))
        await asyncio.sleep(options.pause_seconds)
    minutes = (time.monotonic() - begun) / 60
    used = {name: round((servers.cpu_seconds(pid) - before[name]) / minutes, 2) for name, pid in pids.items()}
    asked = servers.api_calls(at) - calls
    return {
        "edit of a spec to the agent's binding, ms": _percentiles(edits),
        "result of an agent to the status, ms": _percentiles(results),
        "CPU s a minute": used,
        "API calls a second": {name: round(n / minutes / 60, 1) for name, n in asked.most_common(12)},
        "RSS MiB": {name: servers.memory_mib(pid) for name, pid in pids.items()},
        "measured s": round(minutes * 60, 1),
        "longest second of the agents, s": round(max(each.longest_s for each in agents), 1),
    }


async def _edit(kube: Kube, agent: players.Agent, job: str, name: str, rng: random.Random) -> float:
    """Seconds from a change of a running job's priority until its agent is told."""
    binding = (await agent.store.bindings(agent.id))[0].get(job)
    now = 0 if binding is None else binding.spec.priority
    wanted = rng.choice([each for each in range(-4, 5) if each != now])

    async def told() -> bool:
        found = (await agent.store.bindings(agent.id))[0].get(job)
        return found is not None and found.spec.priority == wanted

    begun = time.monotonic()
    await kube.merge(FINETUNE_JOB, servers.NAMESPACE, name, {"spec": {"priority": wanted}})
    await _until(told, PATIENCE_S, lambda: _state(kube, name))
    return time.monotonic() - begun


async def _end(kube: Kube, agent: players.Agent, job: str, name: str) -> float:
    """Seconds from an agent's result until the job's status says so."""

    async def told() -> bool:
        found = await kube.get(FINETUNE_JOB, servers.NAMESPACE, name)
        return bool(found.get("status", {}).get("state") == "Complete")

    begun = time.monotonic()
    await agent.end(job)
    await _until(told, PATIENCE_S, lambda: _state(kube, name))
    return time.monotonic() - begun


async def _state(kube: Kube, name: str) -> str:
    found = await kube.get(FINETUNE_JOB, servers.NAMESPACE, name)
    return json.dumps({"spec": found["spec"], "status": found.get("status")})


async def _until(
    check: Callable[[], Awaitable[bool]],
    patience_s: float,
    state: Callable[[], Awaitable[str]] | None = None,
    look_s: float = LOOK_S,
) -> None:
    deadline = time.monotonic() + patience_s
    while not await check():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {patience_s} s: {await state() if state else ''}")
        await asyncio.sleep(look_s)


def _percentiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    at = {"P50": 0.5, "P99": 0.99}
    chosen = {name: ordered[min(len(ordered) - 1, int(part * len(ordered)))] for name, part in at.items()}
    return {name: round(1000 * value, 1) for name, value in chosen.items()} | {"changes": len(ordered)}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.operator", description=__doc__)
    for name, count in (("endpoints", 1000), ("running", 5000), ("queued", 5000), ("finished", 5000)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--seconds", type=float, default=60.0, help="of measuring")
    parser.add_argument("--settle-seconds", type=float, default=1800.0, help="until all jobs run, at most")
    parser.add_argument("--calm-seconds", type=float, default=10.0, help="from then on until it is measured")
    parser.add_argument("--pause-seconds", type=float, default=0.2, help="between two changes")
    parser.add_argument("--progress-seconds", type=int, default=5, help="how often a job reports its progress")
    parser.add_argument("--profile", default="", help="a file for the operator's cProfile; it is slower meanwhile")
    return parser.parse_args()


if __name__ == "__main__":
    chosen = _options()
    with tempfile.TemporaryDirectory(prefix="coserve-bench-") as name, servers.servers(Path(name)) as running:
        try:
            found = asyncio.run(main(chosen, Path(name), running))
        except TimeoutError:
            print((Path(name) / "operator.log").read_text()[-5000:])
            raise
    print(json.dumps({"sizes": vars(chosen)} | found, indent=2))
