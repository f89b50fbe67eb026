"""Programs of coserve_agent as processes, to be killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

START_S = 180.0


@dataclass
class Program:
    """`python -m MODULE` with COSERVE_ variables; its log goes to a file. `id` is the test's to set."""

    process: subprocess.Popen[bytes]
    log_file: Path
    variables: dict[str, object]
    id: str = ""
    _log_from: int = 0

    @property
    def log(self) -> str:
        return self.log_file.read_bytes()[self._log_from :].decode(errors="replace")

    @property
    def whole_log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def forget_log(self) -> None:
        """From now on `log` is what comes."""
        self._log_from = self.log_file.stat().st_size

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(20)

    def terminate(self, timeout_s: float = 60) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)


@dataclass
class Programs:
    """Starts programs of coserve_agent."""

    folder: Path
    running: list[Program] = field(default_factory=list)

    def start(self, module: str, **variables: object) -> Program:
        return self.run(module, ["-m", f"coserve_agent.{module}"], variables)

    def run(self, name: str, arguments: list[str], variables: dict[str, object]) -> Program:
        """Python with these arguments."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("COSERVE_")}
        environment |= {f"COSERVE_{key.upper()}": str(value) for key, value in variables.items()}
        log_file = self.folder / f"{name}-{len(self.running)}.log"
        with log_file.open("wb") as output:
            process = subprocess.Popen([sys.executable, *arguments], env=environment, stdout=output, stderr=output)
        self.running.append(Program(process, log_file, variables))
        return self.running[-1]


@contextmanager
def running_programs(folder: Path) -> Iterator[Programs]:
    made = Programs(folder)
    yield made
    for one in made.running:
        if one.process.poll() is None:
            one.kill()


@dataclass
class AgentProcess:
    """An agent process that is ready, and the URLs of its two ports."""

    program: Program
    url: str
    admin_url: str


def when_ready(program: Program) -> AgentProcess:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert program.process.poll() is None, program.log
        ports = re.search(r"http port (\d+), admin port (\d+)", program.log)
        if ports is not None:
            made = AgentProcess(program, *(f"http://127.0.0.1:{port}" for port in ports.groups()))
            if httpx.get(f"{made.admin_url}/ready").status_code == 200:
                return made
        time.sleep(0.1)
    raise TimeoutError(program.log)


def post(http: httpx.Client, path: str, body: str | bytes) -> tuple[int, dict[str, Any]]:
    """Status and answer of a body that is sent as it is."""
    answer = http.post(path, content=body if isinstance(body, bytes) else body.encode())
    return answer.status_code, answer.json()
