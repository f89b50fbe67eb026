"""`coserve data` in terminals, pipes and other encodings."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from data_rows import GOOD, TURNS, write
from previewing import COMMAND, FIT, UNFIT, environment, look


def in_a_terminal(*arguments: object, **more: str) -> str:
    """What is written to a terminal."""
    ours, theirs = pty.openpty()
    command = [*COMMAND, *map(str, arguments)]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment(more)) as process:
        os.close(theirs)
        output = b""
        while True:
            try:
                more = os.read(ours, 1 << 16)
            except OSError:  # the other side is closed
                break
            if not more:
                break
            output += more
    os.close(ours)
    assert process.returncode == UNFIT
    return output.decode().replace("\r\n", "\n")


def test_a_terminal_gets_colours_unless_it_says_no(tmp_path: Path, model_folder: Path) -> None:
    row = {"messages": [{"role": "user", "content": "\u001b[31m"}, {"role": "assistant", "content": "one\ntwo"}]}
    arguments = (write(tmp_path, row, b"{"), "--model", model_folder)
    coloured = in_a_terminal(*arguments)
    learned = "".join(re.findall(r"\x1b\[30;(?:42|102|46)m(.*?)\x1b\[0m", coloured.partition("│")[2]))
    assert learned == "one↵two<|end|>"
    assert "\x1b[36m<|user|>\x1b[0m⟨U+001B⟩[31m" in coloured
    assert "\x1b[1;31mnot fit\x1b[0m" in coloured
    assert all(line.count("\x1b[0m") * 2 == line.count("\x1b[") for line in coloured.split("\n"))
    plain = look(*arguments).stdout
    assert "\x1b" not in plain and "«one↵" in plain
    assert in_a_terminal(*arguments, NO_COLOR="1") == in_a_terminal(*arguments, TERM="dumb") == plain
    assert in_a_terminal(*arguments, NO_COLOR="") == coloured


def test_a_terminal_sees_how_far_it_is(tmp_path: Path, model_folder: Path) -> None:
    path = write(tmp_path, *[GOOD] * 600, b"{")
    written = in_a_terminal(path, "--model", model_folder, "--lines", 0)
    assert "\r500 lines read\r\x1b[K\n\x1b[1mline 601" in written
    assert "read" not in look(path, "--model", model_folder, "--lines", 0).stderr


@pytest.mark.parametrize("how", [signal.SIGPIPE, signal.SIGINT])
def test_it_ends_quietly_when_nobody_reads_on(tmp_path: Path, model_folder: Path, how: signal.Signals) -> None:
    path = write(tmp_path, *[{"messages": TURNS}] * 3000)  # more than a pipe holds
    command = [*COMMAND, str(path), "--model", str(model_folder), "--lines", "3000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline()
        if how is signal.SIGPIPE:
            process.stdout.close()
        else:
            process.send_signal(how)
        assert process.stderr.read() == b""
        assert process.wait() == -how


def test_another_encoding_loses_nothing(tmp_path: Path, model_folder: Path) -> None:
    done = look(write(tmp_path, GOOD), "--model", model_folder, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == FIT
    assert r"\xabtwo" in done.stdout


def test_it_needs_no_torch(tmp_path: Path, model_folder: Path) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['coserve', 'data', {str(write(tmp_path, GOOD))!r}, '--model', {str(model_folder)!r}]\n"
        "try:\n    runpy.run_module('coserve_cli.main', run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 0, end.code\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "fit: every line" in done.stdout
