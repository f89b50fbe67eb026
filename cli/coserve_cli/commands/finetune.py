"""`coserve finetune MODEL DATA`."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path
from typing import Any

import click

from coserve_agent.agent import Agent
from coserve_api.common import BatchSize, Epochs, EvalPercent, Rank, Seed, SequenceLength, Steps
from coserve_api.job import DatasetFormat, Learn, OnInvalid, PublishPolicy, Schedule, TargetModule
from coserve_cli.client import Server
from coserve_cli.console import say, say_log
from coserve_cli.jobs import begin, line, suspend, watch
from coserve_cli.models import find_model, short_name
from coserve_cli.options import Checked, MemorySize, names
from coserve_cli.server import run_server, settings_of
from coserve_cli.state import state_folder
from coserve_cli.statuses import INTERRUPTED


@click.command(
    epilog="Ctrl-C saves the job and ends; the same command goes on with it. Exit status: 0 it is complete, 1 it "
    "failed, 130 it was saved and waits."
)
@click.argument("model")
@click.argument("data")
@click.option("--name", help="Of the job and the adapter.  [default: the data's file name]")
@click.option("--state", type=click.Path(path_type=Path), help="Where jobs and adapters lie.  [default: as in serve]")
@click.option("--epochs", type=Checked("N", Epochs), help="Times through the data.  [default: 1]")
@click.option("--steps", type=Checked("N", Steps), help="Optimizer steps, instead of epochs.")
@click.option("--batch-size", type=Checked("N", BatchSize), help="Lines of a step.  [default: 8]")
@click.option("--learning-rate", help="At its peak.  [default: 2e-4]")
@click.option("--schedule", type=names(Schedule), help="How it falls.  [default: linear]")
@click.option("--warmup-steps", type=click.IntRange(0), help="Over which it rises.")
@click.option("--rank", type=Checked("N", Rank), help="[default: 8]")
@click.option("--alpha", type=click.IntRange(1, 4096), help="The output is scaled by alpha / rank.  [default: 16]")
@click.option("--dropout", help="[default: 0]")
@click.option("--target", "targets", multiple=True, type=names(TargetModule), help="May be repeated.  [default: all 7]")
@click.option("--format", "format_", type=names(DatasetFormat), help="Of the rows.  [default: auto]")
@click.option("--learn", type=names(Learn), help="All answers, or the last.  [default: All]")
@click.option("--max-length", type=Checked("N", SequenceLength), help="A longer sample cannot be used.")
@click.option("--on-invalid", type=names(OnInvalid), help="A line that cannot be used.  [default: Fail]")
@click.option("--eval-percent", type=Checked("N", EvalPercent), help="Held out for the evaluation loss.  [default: 5]")
@click.option("--eval-every", type=click.IntRange(0), help="Steps between evaluations.  [default: 0, at the ends]")
@click.option("--publish", type=names(PublishPolicy), help="[default: Always]")
@click.option("--checkpoint-every", type=click.IntRange(1, 1000), help="Steps.  [default: 20]")
@click.option("--seed", type=Checked("N", Seed), help="[default: 0]")
@click.option("--activation-memory", "pass_bytes", type=MemorySize(), help="A pass may keep; a server of its own.")
@click.option("--api-key", envvar="OPENAI_API_KEY", help="Where the server asks for one.")
@click.option("-v", "--verbose", is_flag=True, help="The whole log of server and engine.")
def finetune(
    model: str,
    data: str,
    name: str | None,
    state: Path | None,
    pass_bytes: int | None,
    api_key: str | None,
    verbose: bool,
    **chosen: Any,
) -> None:
    """Train a LoRA adapter of MODEL on DATA, a file of rows, a folder, or a pattern in quotes. MODEL is the URL of a
    server that runs, such as http://127.0.0.1:8000, or a folder or hf:ORG/NAME, for which one is started.
    """
    name = name or _name_of(data)
    spec = spec_of(data, name, chosen)
    if model.startswith(("http://", "https://")):
        sys.exit(_run(Server(model, api_key), name, spec))
    say_log(verbose)
    folder = find_model(model)
    settings = settings_of(
        folder,
        model_name=short_name(model),
        host="127.0.0.1",
        http_port=0,
        admin_port=0,
        state=state_folder(state, short_name(model)),
        pass_bytes=pass_bytes,
        max_rank=chosen["rank"],
    )
    say(f"loading {folder}")
    statuses: list[int] = []

    def ready(agent: Agent, seconds: float) -> None:
        say(f"ready in {seconds:.1f} s on {agent.engine.device or 'this machine'}")

    async def beside(agent: Agent) -> None:
        statuses.append(await asyncio.to_thread(_follow, agent, name, spec, model, state))

    status = run_server(settings, ready, beside)
    if not statuses or statuses[0] == INTERRUPTED:  # the server has saved it
        say(f"job {name} is saved; go on with the same command")
        sys.exit(INTERRUPTED)
    sys.exit(statuses[0] or status)


def spec_of(data: str, name: str, chosen: dict[str, Any]) -> dict[str, Any]:
    """The spec of a FinetuneJob, as docs/custom-resources.md has it."""
    if chosen["epochs"] is not None and chosen["steps"] is not None:
        raise click.UsageError("--epochs and --steps: give one of them")
    length = {"maxSteps": chosen["steps"]} if chosen["steps"] is not None else {"epochs": chosen["epochs"] or 1}
    spec: dict[str, Any] = {
        "dataset": {
            "uri": f"file://{Path(data).expanduser().absolute()}",
            "format": chosen["format_"],
            "learn": chosen["learn"],
            "maxSequenceLength": chosen["max_length"],
            "onInvalid": chosen["on_invalid"],
            "evalPercent": chosen["eval_percent"],
        },
        "adapter": {
            "name": name,
            "rank": chosen["rank"],
            "alpha": chosen["alpha"],
            "dropout": chosen["dropout"],
            "targetModules": list(chosen["targets"]) or None,
        },
        "training": length
        | {
            "batchSize": chosen["batch_size"],
            "learningRate": chosen["learning_rate"],
            "schedule": chosen["schedule"],
            "warmupSteps": chosen["warmup_steps"],
            "seed": chosen["seed"],
        },
        "checkpoint": {"everySteps": chosen["checkpoint_every"]},
        "evaluation": {"everySteps": chosen["eval_every"]},
        "publish": {"policy": chosen["publish"]},
    }
    return {
        part: {field: value for field, value in fields.items() if value is not None} for part, fields in spec.items()
    }


def _name_of(data: str) -> str:
    """A label from the data's file name."""
    stem = Path(data).name.partition(".")[0].lower()
    name = re.sub(r"[^a-z0-9-]+", "-", stem).strip("-")[:63].strip("-")
    if not name:
        raise click.UsageError(f"{data!r} makes no name for a job; give one with --name")
    return name


def _follow(agent: Agent, name: str, spec: dict[str, Any], model: str, state: Path | None) -> int:
    """In a thread, beside a server of our own."""
    server = Server(f"http://127.0.0.1:{agent.http.port}")
    try:
        job = watch(server, begin(server, name, spec)["name"])
    except click.ClickException as error:
        if agent.lifecycle.draining:
            return INTERRUPTED
        error.show()
        return error.exit_code
    where = "" if state is None else f" --state {state}"
    return _said(job, f"coserve serve {model}{where}, then coserve chat --model {name}")


def _run(server: Server, name: str, spec: dict[str, Any]) -> int:
    """In a server that runs."""
    begin(server, name, spec)
    try:
        job = watch(server, name)
    except KeyboardInterrupt:
        say("\nsaving it; a second Ctrl-C leaves the job running")
        job = suspend(server, name)
        say(line(job))
        say("go on with the same command")
        return INTERRUPTED
    return _said(job, f"coserve chat --url {server.url} --model {name}")


def _said(job: dict[str, Any], how: str) -> int:
    if job["state"] != "Completed":
        say(line(job))
        return 1
    if adapter := job.get("adapter"):
        click.echo(str(adapter["path"]))
        say(f"try: {how}")
    return 0
