"""A finetuning job in a server, from here: made, watched, given back on Ctrl-C."""

from __future__ import annotations

import time
from typing import Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from coserve_cli.client import Server
from coserve_cli.console import console, duration, say

JOBS = "/v1/finetune_jobs"
OVER = ("Completed", "Failed", "Cancelled")
LOOK_S = 0.5
SAY_EVERY_S = 15.0
"""Between two lines where there is no terminal."""
SAVE_S = 60.0


def watch(server: Server, name: str) -> dict[str, Any]:
    """Show how the job goes until it is over; returns it then."""
    shown = _Bar() if console.is_terminal else _Lines()
    with shown:
        while True:
            job = server.get(f"{JOBS}/{name}")
            shown.show(job)
            if job["state"] in OVER:
                return dict(job)
            time.sleep(LOOK_S)


def suspend(server: Server, name: str) -> dict[str, Any]:
    """Have the job saved and given back; returns it once it is, or after SAVE_S."""
    job = server.post(f"{JOBS}/{name}/suspend", {})
    until_s = time.monotonic() + SAVE_S
    while job["state"] not in ("Suspended", *OVER) and time.monotonic() < until_s:
        time.sleep(LOOK_S)
        job = server.get(f"{JOBS}/{name}")
    return dict(job)


def begin(server: Server, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    """The job of that name: a new one, or the one that is there and not over, which goes on.

    Raises:
        click.ClickException: the server refuses it, or has one of this name that is over.
    """
    for job in server.get(JOBS)["data"]:
        if job["name"] != name:
            continue
        if job["state"] in OVER:
            raise click.ClickException(
                f"a job {name} is there, and {job['state']}; choose another with --name, or delete it with: "
                f"curl -X DELETE {server.url}{JOBS}/{name}"
            )
        say(f"job {name} is there at step {job.get('step') or 0}; it goes on with what it was made with")
        return dict(server.post(f"{JOBS}/{name}/resume", {}) if job["state"] == "Suspended" else job)
    return dict(server.post(JOBS, {"name": name, "spec": spec}))


def line(job: dict[str, Any]) -> str:
    """How a job is, in one line."""
    parts = [f"{job['name']}: {job['state']}"]
    if job.get("total_steps"):
        parts.append(f"step {job.get('step') or 0} of {job['total_steps']}")
    parts += _figures(job)
    if job.get("message"):
        parts.append(str(job["message"]))
    return ", ".join(parts)


def _figures(job: dict[str, Any]) -> list[str]:
    parts = []
    if job.get("loss") is not None:
        parts.append(f"loss {job['loss']:.4f}")
    if job.get("eval_loss") is not None:
        parts.append(f"held out {job['eval_loss']:.4f}")
    if job.get("tokens_per_second"):
        parts.append(f"{job['tokens_per_second']:,.0f} tokens/s")
    if job.get("eta_seconds") is not None and job["state"] == "Running":
        parts.append(f"{duration(job['eta_seconds'])} left")
    return parts


class _Lines:
    """A line whenever the state changes, after the first step, and every SAY_EVERY_S."""

    def __init__(self) -> None:
        self._said: tuple[str, str, bool] = ("", "", False)
        self._said_s = 0.0

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, job: dict[str, Any]) -> None:
        what, now_s = (job["state"], str(job.get("message") or ""), bool(job.get("step"))), time.monotonic()
        if what != self._said or now_s - self._said_s >= SAY_EVERY_S:
            self._said, self._said_s = what, now_s
            say(line(job))


class _Bar:
    """A bar of steps, with loss, rate and what is left."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            console=console,
        )
        self._task = self._progress.add_task("", total=None, figures="")

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, job: dict[str, Any]) -> None:
        said = str(job.get("message") or "") if job["state"] != "Running" else ""
        self._progress.update(
            self._task,
            description=f"{job['name']}: {job['state']}",
            total=job.get("total_steps") or None,
            completed=job.get("step") or 0,
            figures=", ".join([*_figures(job), *([said] if said else [])]),
        )
