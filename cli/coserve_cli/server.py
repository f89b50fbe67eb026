"""An agent on this machine: its settings from what was typed, and its life from here to Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

from coserve_agent.agent import Agent
from coserve_agent.errors import StartError
from coserve_agent.priority import take_short_turns
from coserve_agent.settings import AgentSettings
from coserve_engine.errors import ModelFolderError
from coserve_engine.formats.model_folder import read_model_config

LONGEST = 8192
"""Tokens of prompt and answer where neither the user nor the model says less."""
READY_EVERY_S = 0.05
STOPPING = (signal.SIGTERM, signal.SIGINT)
DRAIN_S, SHUTDOWN_S = 0.0, 20.0
"""Nobody sends new requests for a while, as a Service does; what runs may finish."""


def settings_of(model: Path, **chosen: Any) -> AgentSettings:
    """Settings of a server for the model in this folder; what is None is left to its default.

    Raises:
        click.UsageError: a value, or the model's folder, is wrong.
    """
    given = {name: value for name, value in chosen.items() if value is not None}
    given.setdefault("threads", max(1, len(os.sched_getaffinity(0)) - 1))
    given.setdefault("drain_s", DRAIN_S)
    given.setdefault("shutdown_s", SHUTDOWN_S)
    try:
        given.setdefault("max_model_length", min(LONGEST, read_model_config(model).max_positions))
        return AgentSettings(model_path=model, **given)
    except ModelFolderError as error:
        raise click.ClickException(str(error)) from None
    except ValidationError as error:
        raise click.UsageError("; ".join(map(_explained, error.errors(include_url=False)))) from None


def _explained(error: Any) -> str:
    option = "--" + str(error["loc"][0]).lower().removeprefix("coserve_").replace("_", "-") if error["loc"] else ""
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{option} is {error['input']!r}: {message[:1].lower()}{message[1:]}" if option else message


def run_server(
    settings: AgentSettings,
    ready: Callable[[Agent, float], None],
    beside: Callable[[Agent], Awaitable[None]] | None = None,
) -> int:
    """Serve until Ctrl-C or SIGTERM, or until `beside`, which begins when the server is ready, has ended. A second
    Ctrl-C does not wait for what runs.

    Returns the exit status: 0, or 1 if the engine ended.

    Raises:
        click.ClickException: it cannot start.
    """
    take_short_turns()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # until `_run` listens: nothing is half made then
    try:
        return asyncio.run(_run(settings, ready, beside))
    except StartError as error:
        raise click.ClickException(str(error)) from None
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


async def _run(
    settings: AgentSettings, ready: Callable[[Agent, float], None], beside: Callable[[Agent], Awaitable[None]] | None
) -> int:
    begun_s = time.monotonic()
    loop = asyncio.get_running_loop()
    asked = 0

    def stop() -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            agent.stop()
        else:
            running.cancel()

    for number in STOPPING:
        loop.add_signal_handler(number, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    agent = Agent(settings)  # holds the loop: `stop` is called after it
    running = asyncio.create_task(agent.run())

    async def watch() -> None:
        while agent.lifecycle.not_ready() is not None:
            if agent.lifecycle.draining:
                return
            await asyncio.sleep(READY_EVERY_S)
        ready(agent, time.monotonic() - begun_s)
        if beside is not None:
            await beside(agent)
            agent.stop()

    watching = asyncio.create_task(watch())
    try:
        await asyncio.wait((running, watching), return_when=asyncio.FIRST_COMPLETED)
        if watching.done():
            watching.result()
        return await running
    except asyncio.CancelledError:
        return 1
    finally:
        watching.cancel()
