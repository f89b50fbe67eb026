"""A small random model with its own tokenizer, and real agents on it: in a thread for HTTP tests, as processes to be
killed.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from agent_programs import START_S, AgentProcess, Programs, running_programs, when_ready
from driver_rig import MakeRig, rigs
from hermes_model import SCRIPTS, TEMPLATE
from scripted_model import write_scripted
from small_models import (
    CONTEXT,
    INSTRUCT_TEMPLATE,
    PLAIN_TEMPLATE,
    write_model,
    write_sentencepiece,
    write_tokenizer,
)

from coserve_agent.agent import Agent
from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.settings import AgentSettings


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tokenizer(model_folder: Path) -> Tokenizer:
    return Tokenizer(model_folder)


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose tokenizer is like Llama 2's."""
    return write_model(tmp_path_factory.mktemp("sentencepiece"), INSTRUCT_TEMPLATE, write_sentencepiece, 2)


@pytest.fixture(scope="session")
def sentencepiece_tokenizer(sentencepiece: Path) -> Tokenizer:
    return Tokenizer(sentencepiece)


@pytest.fixture(scope="session")
def plain_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The same tokenizer, its chat template without {% generation %}."""
    folder = tmp_path_factory.mktemp("plain")
    write_tokenizer(folder, PLAIN_TEMPLATE)
    return Tokenizer(folder)


@pytest.fixture
def rig(tmp_path: Path) -> MakeRig:
    """Drivers on real engines, without Redis."""
    return rigs(tmp_path)


# ---- an agent in a thread ----


class AgentThread:
    """An agent with a loop of its own; `agent` may be looked at, and changed through `call`."""

    def __init__(self, settings: AgentSettings) -> None:
        self._settings = settings
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._main, name="agent")
        self.failure: BaseException | None = None
        self.status: int | None = None
        self.agent: Agent
        self.loop: asyncio.AbstractEventLoop

    def _main(self) -> None:
        async def run() -> int:
            self.loop = asyncio.get_running_loop()
            try:
                self.agent = Agent(self._settings)
            finally:
                self._started.set()
            return await self.agent.run()

        try:
            self.status = asyncio.run(run())
        except BaseException as error:
            self.failure = error

    def start(self) -> AgentThread:
        self._thread.start()
        self._started.wait()
        deadline = time.monotonic() + START_S
        while self.failure is None:
            try:
                if httpx.get(f"{self.admin_url}/ready").status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            if time.monotonic() > deadline:
                raise TimeoutError("the agent did not become ready")
            time.sleep(0.05)
        raise self.failure

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.agent.http.port}"

    @property
    def admin_url(self) -> str:
        return f"http://127.0.0.1:{self.agent.admin.port}"

    def call(self, function: Callable[[], Any]) -> Any:
        """The result of `function` in the agent's loop."""

        async def run() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(10)

    def stop(self) -> None:
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.agent.stop)
        self._thread.join(60)
        assert not self._thread.is_alive()


def serving_only(model: Path, artifacts: Path) -> dict[str, Any]:
    """Settings of an agent that serves the model, without Redis."""
    return {
        "model_path": model,
        "model_name": "base",
        "max_model_length": CONTEXT,
        "host": "127.0.0.1",
        "http_port": 0,
        "admin_port": 0,
        "kv_cache_bytes": 16 << 20,
        "artifacts": artifacts,
    }


@pytest.fixture(scope="session")
def settings(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., AgentSettings]:
    def make(**changes: Any) -> AgentSettings:
        values = serving_only(model_folder, tmp_path_factory.mktemp("artifacts"))
        return AgentSettings(**values | {"drain_s": 0} | changes)

    return make


@pytest.fixture(scope="session")
def start_agent(settings: Callable[..., AgentSettings]) -> Iterator[Callable[..., AgentThread]]:
    """Start an agent in a thread; all are stopped at the end."""
    started: list[AgentThread] = []

    def start(**changes: Any) -> AgentThread:
        started.append(AgentThread(settings(**changes)))
        return started[-1].start()

    yield start
    for one in started:
        one.stop()


@pytest.fixture(scope="session")
def served(start_agent: Callable[..., AgentThread]) -> AgentThread:
    """One agent without Redis that all HTTP tests share."""
    return start_agent()


@pytest.fixture(scope="session")
def hermes(start_agent: Callable[..., AgentThread], tmp_path_factory: pytest.TempPathFactory) -> AgentThread:
    """One whose model calls tools, and thinks."""
    return start_agent(model_path=write_scripted(tmp_path_factory.mktemp("hermes"), TEMPLATE, SCRIPTS))


@pytest.fixture
def client(served: AgentThread) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def http(served: AgentThread) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=60) as client:
        yield client


# ---- programs ----


@pytest.fixture(scope="session")
def start_programs() -> Callable[[Path], AbstractContextManager[Programs]]:
    """Programs for a longer time than a test; none outlives the `with` block."""
    return running_programs


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    """Programs for one test."""
    with running_programs(tmp_path) as made:
        yield made


@pytest.fixture
def variables(model_folder: Path, tmp_path: Path) -> dict[str, object]:
    """Of an agent process that serves the small model, without Redis."""
    return serving_only(model_folder, tmp_path)


@pytest.fixture
def start_processes(programs: Programs, variables: dict[str, object]) -> Callable[..., list[AgentProcess]]:
    """Start agent processes, one for each given change of `variables`, and wait until all are ready."""

    def start(*changes: dict[str, object]) -> list[AgentProcess]:
        started = [programs.start("main", **variables | one) for one in changes]
        return [when_ready(one) for one in started]

    return start


@pytest.fixture(autouse=True, scope="session")
def _quiet_logs() -> None:
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
