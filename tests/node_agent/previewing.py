"""`python -m coserve_agent.data`, as a process and without one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from coserve_agent.data.arguments import parser
from coserve_agent.data.preview import preview

COMMAND = [sys.executable, "-m", "coserve_agent.data"]
FIT, UNFIT, WRONG = 0, 1, 2


def look(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    """Its output, which must hold no traceback."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        env=environment(more), capture_output=True, text=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done


def look_here(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """The same without a process of its own: exit status, output, errors."""
    status = preview(parser().parse_args([*map(str, arguments)]))
    return status, *capsys.readouterr()


def environment(more: dict[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TERM")}
    return kept | {"TERM": "xterm"} | more
