"""`coserve data`, as a process and without one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from coserve_cli.main import main

COMMAND = [sys.executable, "-m", "coserve_cli.main", "data"]
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
    with pytest.raises(SystemExit) as ended:
        main.main(["data", *map(str, arguments)], prog_name="coserve")
    assert isinstance(ended.value.code, int)
    return ended.value.code, *capsys.readouterr()


def environment(more: dict[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TERM")}
    return kept | {"TERM": "xterm"} | more
