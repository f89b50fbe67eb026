"""Apply an endpoint and a job, replay traffic while the job trains, and judge what came of it. See --help."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
from gsm8k import load_split
from rich.console import Console

from demo.answers import Score, ask
from demo.causes import misses, pauses_said
from demo.client import Work
from demo.cluster import ENDPOINTS, JOBS, Cluster, DemoError, condition, connected, kubectl, manifest
from demo.display import Display
from demo.picture import by_second, draw
from demo.remote import RemoteClient
from demo.replay import Prompts, Replayer, Sample, Slo
from demo.trace import Recorded, Replay, Scaling, fit, read_trace
from demo.watch import AgentLog, Watcher, finetune_rate

EXAMPLES = Path(__file__).parent.parent
TRACE = EXAMPLES / "data" / "AzureLLMInferenceTrace_conv_10min.csv"
JOB = "gsm8k-json"
QUESTIONS = 24
ALONE_S = 15.0
LEAST_ATTAINMENT = 99.0
DRAWING_NICE = 10
LEAST_STEPS = 100
"""With fewer the adapter does not learn the form."""


@dataclass(frozen=True)
class Case:
    """A model to run the demo on: the manifests of its endpoint and of the job JOB, and for how long traffic comes."""

    endpoint_file: str
    job_file: str
    seconds: float


CASES = {
    "tiny": Case("endpoint.yaml", "job.yaml", 120.0),
    "smollm2": Case("endpoint-smollm2.yaml", "job-smollm2.yaml", 240.0),
}
"""By the name of the endpoint, which is that of the model."""


@dataclass(frozen=True)
class Verdict:
    """What the last line says; each limit that is missed is a reason for exit status 1."""

    state: str
    attainment_percent: float
    failed: int
    finetune_percent: float
    loss_before: float
    loss_after: float

    def misses(self) -> list[str]:
        checks = {
            f"the job is {self.state}, not Complete": self.state != "Complete",
            f"{self.failed} requests failed": self.failed > 0,
            f"attainment {self.attainment_percent:.1f} % is below {LEAST_ATTAINMENT:.0f} %": self.attainment_percent
            < LEAST_ATTAINMENT,
            f"held-out loss {self.loss_before} -> {self.loss_after} did not fall": self.loss_after >= self.loss_before,
            f"finetuning kept {self.finetune_percent:.0f} % of its rate alone, below 30 %": self.finetune_percent
            < 30.0,
        }
        return [text for text, missed in checks.items() if missed]


def main() -> int:
    """Run the demo; the exit status is 0 only if every promise was kept."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--mounted-environment", action="store_true", help="the cluster has the thin agent image only")
    parser.add_argument("--model", choices=CASES, default="tiny", help="what the endpoint serves")
    parser.add_argument("--tokenizer", type=Path, default=EXAMPLES / "base-model", help="the folder of that model")
    parser.add_argument(
        "--utilisation", type=float, default=30.0, help="percent of the agents' time that serving takes"
    )
    parser.add_argument("--seconds", type=float, help="length of the replay (default: the model's)")
    parser.add_argument("--raw", type=Path, default=Path(".cache/demo.json"), help="where the raw times are written")
    options = parser.parse_args()
    case = CASES[options.model]
    options.seconds = options.seconds or case.seconds
    try:
        with connected() as cluster:
            return asyncio.run(run(cluster, case, options))
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted; the endpoint and the job stay, delete them with: kubectl delete iep,ftj --all")
        return 130


async def run(cluster: Cluster, case: Case, options: argparse.Namespace) -> int:
    console, endpoint = Console(), options.model
    endpoint_body = apply(case.endpoint_file, options.mounted_environment)
    cluster.wait(ENDPOINTS, endpoint, "endpoint is starting", _all_ready, 600)
    job_body = apply(case.job_file, options.mounted_environment)
    started = until_it_trains(cluster)
    agents = cluster.agents(endpoint)
    watcher = Watcher(cluster, [AgentLog(agent) for agent in agents], endpoint, JOB)
    print(f"finetuning alone, measured for {ALONE_S:.0f} s", flush=True)
    alone = await finetune_rate(watcher, ALONE_S)
    steps = fitting_steps(cluster.get(JOBS, JOB), alone, options.seconds)
    if steps is not None:
        print(f"the job would outlast the traffic by far on this machine: once more, with maxSteps {steps}")
        print(kubectl("delete", "ftj", JOB, "--wait").strip())
        apply(case.job_file, options.mounted_environment, training={"maxSteps": steps})
        started = until_it_trains(cluster)
    slo = Slo(*(seconds(endpoint_body["spec"]["slo"][name]) for name in ("timeToFirstToken", "timePerOutputToken")))
    context = endpoint_body["spec"]["model"]["maxModelLength"]
    urls = cluster.base_urls(endpoint, agents)
    corpus = " ".join(problem.question for problem in load_split().held_out)
    prompts = Prompts(corpus, str(options.tokenizer))
    free = [agent.api for agent in agents if agent.pod != started["status"]["binding"]["agent"]] or urls
    recorded = read_trace(TRACE)
    busy_s = await seconds_a_request(free[0], endpoint, prompts, fit(recorded, Scaling(context=context)))
    rate = options.utilisation / 100 * len(agents) / busy_s
    scaling = Scaling(seconds=options.seconds, rate=rate, context=context)
    replay = fit(recorded, scaling)
    print(
        f"a mean request takes {busy_s * 1e3:.0f} ms by itself; utilisation {options.utilisation:.0f} % is {rate:.2f}/s"
    )
    print(describe(replay, scaling), flush=True)
    work = Work(urls, endpoint, corpus, str(options.tokenizer), replay.arrivals)
    async with RemoteClient(work) as client:
        began, during = await traffic(console, watcher, client, slo)
    paths = [path for log in watcher.logs for path in log.requests(began)]
    missed = misses(client.samples, slo, paths, client.stalls)
    status = await complete(console, watcher, slo)
    scores = await compare(urls[0], endpoint, job_body["spec"]["adapter"]["name"])
    verdict = judge(status, client.samples, slo, 100.0 * during / alone if alone else 0.0)
    pauses = pauses_said(watcher.logs, began, client.stalls)
    print("\n".join(["", *missed.lines(), pauses]))
    report(verdict, scores, client.samples, alone, during, status)
    save(options.raw, client, watcher, paths)
    shown = by_second(watcher.logs, client.samples, began, round(options.seconds) + 5)
    picture = options.raw.with_suffix(".svg")
    picture.write_text(draw(shown, slo, "make demo: a job trains while a conversation trace is served"))
    print(f"picture: {picture}")
    for miss in verdict.misses():
        print(f"MISSED: {miss}")
    if verdict.attainment_percent < LEAST_ATTAINMENT and missed.only_the_machines:
        print("        nothing but pauses of this machine did that: see above; run it where less else runs")
    return 1 if verdict.misses() else 0


def until_it_trains(cluster: Cluster) -> dict[str, Any]:
    """Wait for the job's first step, and say where it runs."""
    body = cluster.wait(JOBS, JOB, "job is starting", _training, 120)
    print(
        f"  trains on {body['status']['binding']['agent']} since epoch {body['status']['binding']['epoch']}", flush=True
    )
    return body


def fitting_steps(body: dict[str, Any], tokens_per_s: float, seconds: float) -> int | None:
    """Steps that take about as long as the traffic of so many seconds, in which finetuning keeps some 80 % of its rate
    alone; None where the job does not take much longer.
    """
    progress, wanted = body["status"]["progress"], body["spec"]["training"]["maxSteps"]
    fitting = max(LEAST_STEPS, round(0.8 * tokens_per_s * seconds * progress["step"] / progress["tokens"]))
    return fitting if wanted > 1.5 * fitting else None


def apply(name: str, mounted: bool, **parts: dict[str, Any]) -> dict[str, Any]:
    """Apply an example, showing the command as a user would type it; `parts` change parts of its spec."""
    body = manifest(EXAMPLES / name, mounted_environment=mounted)
    for part, fields in parts.items():
        body["spec"][part] |= fields
    changed = f" (with {parts})" if parts else ""
    print(f"$ kubectl apply -f examples/{name}{changed}", flush=True)
    print(kubectl("apply", "-f", "-", stdin=json.dumps(body)).strip(), flush=True)
    return body


def seconds(duration: str) -> float:
    """'200ms' or '1s' in seconds."""
    return float(duration[:-2]) / 1e3 if duration.endswith("ms") else float(duration[:-1])


def describe(replay: Replay, scaling: Scaling) -> str:
    return (
        f"replaying {len(replay.arrivals)} requests of the Azure conversation trace (2023, CC-BY 4.0), from its "
        f"{scaling.skip_s:.0f}th second, in {scaling.seconds:.0f} s: "
        f"mean {scaling.rate:.2f} a second, {scaling.burst_factor:g} times that "
        f"from {scaling.burst_at_s:.0f} s for {scaling.burst_s:.0f} s; prompts / {scaling.prompt_divisor}, "
        f"answers / {scaling.output_divisor}; {replay.left_out_percent:.1f} % left out as longer than the "
        f"context of {scaling.context}"
    )


async def seconds_a_request(base_url: str, model: str, prompts: Prompts, replay: Replay) -> float:
    """How long a request of the schedule's mean lengths takes an agent that does nothing else: the median of five."""
    count = len(replay.arrivals)
    mean = Recorded(
        0.0,
        round(sum(a.prompt_tokens for a in replay.arrivals) / count),
        round(sum(a.output_tokens for a in replay.arrivals) / count),
    )
    probe = Replayer([base_url], model, prompts)
    for _ in range(5):
        await probe.run([mean], time.monotonic())
    await probe.close()
    failed = [sample.error for sample in probe.samples if sample.error]
    if failed:
        raise DemoError(f"a request to {base_url} failed: {failed[0]}")
    return sorted(sample.token_times_s[-1] - sample.due_s for sample in probe.samples)[2]


async def traffic(console: Console, watcher: Watcher, client: RemoteClient, slo: Slo) -> tuple[float, float]:
    """Replay; returns when it began, and finetuning tokens a second while the job trained and requests came."""
    stop = asyncio.Event()
    await watcher.poll()
    with Display(console, watcher, slo, f"kubectl get ftj {JOB}") as display:
        display.update("traffic begins", client.samples)
        os.nice(DRAWING_NICE)  # the client runs without it: what is drawn is not to delay what is measured
        marks, started = watcher.mark(), time.monotonic()
        sending = asyncio.create_task(client.run(started))
        polling = asyncio.create_task(watcher.run(stop))
        trained_until = started
        while not sending.done():
            await asyncio.sleep(1.0)
            if watcher.mix(2.0)["backward"] > 0:
                trained_until = time.monotonic()
            display.update(f"traffic, {time.monotonic() - started:.0f} s", client.samples)
    stop.set()
    await polling
    await sending
    return started, watcher.finetune_tokens(marks) / max(1.0, trained_until - started)


async def complete(console: Console, watcher: Watcher, slo: Slo) -> dict[str, Any]:
    """Wait for the job's end with the display on; returns its status."""
    stop = asyncio.Event()
    polling = asyncio.create_task(watcher.run(stop))
    deadline = time.monotonic() + 300
    with Display(console, watcher, slo, f"kubectl wait --for=condition=Complete ftj/{JOB}") as display:
        while not _ended(watcher.job) and time.monotonic() < deadline:
            await asyncio.sleep(1.0)
            display.update("the rest of the job, without traffic", ())
    stop.set()
    await polling
    return watcher.job.get("status", {})


async def compare(base_url: str, base: str, adapter: str) -> dict[str, Score]:
    """Ask base and adapter the same held-out questions, by name."""
    problems = load_split().held_out[:QUESTIONS]
    async with openai.AsyncOpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=2) as client:
        names = sorted(model.id for model in (await client.models.list()).data)
        print(f"GET /v1/models: {', '.join(names)}")
        return {name: await ask(client, name, problems) for name in (base, adapter) if name in names}


def judge(status: dict[str, Any], samples: Sequence[Sample], slo: Slo, finetune_percent: float) -> Verdict:
    progress = status.get("progress", {})
    return Verdict(
        state=status.get("state", "unknown"),
        attainment_percent=100.0 * sum(map(slo.attained, samples)) / max(1, len(samples)),
        failed=sum(s.error is not None for s in samples),
        finetune_percent=finetune_percent,
        loss_before=float(progress.get("evalLossInitial", "nan")),
        loss_after=float(progress.get("evalLoss", "nan")),
    )


def report(
    verdict: Verdict,
    scores: dict[str, Score],
    samples: Sequence[Sample],
    alone: float,
    during: float,
    status: dict[str, Any],
) -> None:
    question = load_split().held_out[0].question
    print(f"\nQuestion: {question}")
    for name, score in scores.items():
        print(f"  {name}: {score.first}")
        print(f"    valid JSON {score.valid}/{score.total}, correct {score.correct}/{score.total}")
    print("(the adapter has learnt the form; a model this small does not learn to calculate)")
    for error in sorted({s.error for s in samples if s.error})[:5]:
        print(f"  failed request: {error}")
    print(f"finetuning: {alone:.0f} tokens/s alone, {during:.0f} tokens/s under traffic")
    restarts = f", {status['restarts']} restarts" if status.get("restarts") else ""
    print(
        f"job {verdict.state}{restarts} | "
        f"held-out loss {verdict.loss_before:.2f} -> {verdict.loss_after:.2f} | "
        f"strict SLO attainment {verdict.attainment_percent:.1f} % of {len(samples)} | "
        f"failed {verdict.failed} | finetuning {verdict.finetune_percent:.0f} % of its rate alone"
    )


def save(path: Path, client: RemoteClient, watcher: Watcher, paths: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = {
        "requests": [
            {"id": s.name, "due": s.due_s, "tokens": s.token_times_s, "wanted": s.wanted_tokens, "error": s.error}
            for s in client.samples
        ],
        "paths": paths,
        "client_stalls": client.stalls,
        "iterations": {log.agent.pod: log.iterations for log in watcher.logs},
        "losses": list(watcher.losses),
    }
    path.write_text(json.dumps(raw))
    print(f"raw times: {path}")


def _all_ready(body: dict[str, Any]) -> bool:
    status = body.get("status", {})
    broken = condition(body, "Ready")
    if broken.get("reason") in ("ModelNotFound", "InvalidModel"):
        raise DemoError(f"the endpoint cannot start: {broken.get('message')}")
    return condition(body, "Ready").get("status") == "True" and status.get("readyReplicas") == body["spec"]["replicas"]


def _training(body: dict[str, Any]) -> bool:
    if _ended(body):
        raise DemoError(f"the job ended early: {condition(body, 'Failed').get('message', 'it was complete already')}")
    return body.get("status", {}).get("progress", {}).get("step", 0) >= 1


def _ended(body: dict[str, Any]) -> bool:
    return "True" in (condition(body, "Complete").get("status"), condition(body, "Failed").get("status"))


if __name__ == "__main__":
    sys.exit(main())
