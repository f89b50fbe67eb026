"""`coserve` as a process."""

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

COMMAND = [sys.executable, "-m", "coserve_cli.main"]
WAIT_S = 180.0


def _hear_ctrl_c() -> None:
    """As in a terminal: who runs in the background of a shell, as the tests may, ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass
class Running:
    """One that goes on; its output goes to files."""

    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def said(self) -> str:
        return (self.folder / "stderr").read_text(errors="replace")

    @property
    def output(self) -> str:
        return (self.folder / "stdout").read_text(errors="replace")

    def wait_for(self, pattern: str) -> re.Match[str]:
        """What of its standard error first matches."""
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            if found := re.search(pattern, self.said):
                return found
            assert self.process.poll() is None, self.said
            time.sleep(0.05)
        raise TimeoutError(self.said)

    def interrupt(self) -> None:
        """Ctrl-C, which reaches the whole group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self) -> int:
        return self.process.wait(WAIT_S)


@dataclass
class Cli:
    """Calls `coserve` with a home of its own. `environment` is added to this process's, but for COSERVE_."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    running: list[Running] = field(default_factory=list)

    def _environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("COSERVE_", "OPENAI_"))}
        return kept | {"HOME": str(self.folder)} | self.environment

    def __call__(self, *arguments: object, text: str | None = None) -> subprocess.CompletedProcess[str]:
        """To its end; no traceback may be seen."""
        done = subprocess.run(
            [*COMMAND, *map(str, arguments)],
            env=self._environment(),
            capture_output=True,
            text=True,
            check=False,
            input=text or "",
            timeout=WAIT_S,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def start(self, *arguments: object) -> Running:
        folder = self.folder / f"run-{len(self.running)}"
        folder.mkdir()
        with (folder / "stdout").open("wb") as output, (folder / "stderr").open("wb") as errors:
            process = subprocess.Popen(
                [*COMMAND, *map(str, arguments)],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                start_new_session=True,
                preexec_fn=_hear_ctrl_c,  # noqa: PLW1509  (no other thread starts programs)
            )
        self.running.append(Running(process, folder))
        return self.running[-1]

    def serve(self, model: Path, *arguments: object) -> tuple[Running, str]:
        """A server that is ready, and its URL."""
        server = self.start("serve", model, "--port", 0, *arguments)
        return server, server.wait_for(r"ready in .*: (http://\S+?)/v1,")[1]


@contextmanager
def running_cli(folder: Path) -> Iterator[Cli]:
    made = Cli(folder)
    yield made
    for one in made.running:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait(20)
