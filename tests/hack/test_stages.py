"""The stages of `hack/deploy`: those that can overlap do, a failure or Ctrl-C ends all, and times are kept."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HACK = Path(__file__).parents[2] / "hack"
PATIENCE_S = 60

Start = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a script that declares stages and runs them, in a process group of its own as in a terminal."""
    started: list[subprocess.Popen[str]] = []

    def run(stages: str) -> subprocess.Popen[str]:
        script = f"""
            set -euo pipefail
            HACK={HACK}
            . $HACK/lib/common.sh
            . $HACK/lib/stages.sh
            {stages}
            run_stages
        """
        environment = os.environ | {"COSERVE_CACHE": str(tmp_path / "cache")}
        process = subprocess.Popen(
            ["env", "--default-signal=INT", "bash", "-c", script],  # whoever started the tests may ignore it
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        with process:  # closes its pipes
            pass


@pytest.fixture
def times(tmp_path: Path) -> Path:
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache" / "stage-times"


def said(process: subprocess.Popen[str], status: int = 0) -> str:
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == status, errors
    return errors


def alive(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_stages_overlap_unless_one_needs_the_other(start: Start, tmp_path: Path) -> None:
    """The first two end only when both run; the third finds what they left."""
    os.mkfifo(tmp_path / "here")
    os.mkfifo(tmp_path / "there")
    text = said(
        start("""
        stage a 5 "" "first";          stage_a() { echo a >here; cat there >a; }
        stage b 5 "" "second";         stage_b() { cat here >b; echo b >there; }
        stage c 5 "a b" "the third";   stage_c() { cat b a >c; }
        """)
    )
    assert (tmp_path / "c").read_text() == "a\nb\n"
    assert [line.rsplit(": ")[1] for line in text.splitlines() if "done in" in line][2] == "the third"


@pytest.fixture
def beside(tmp_path: Path) -> str:
    """Two stages: `long` runs a program in a process group of its own, as `progress` does, and `short` goes on
    once it runs.
    """
    os.mkfifo(tmp_path / "begun")
    return """
        stage long 50 "" "long"
        stage_long() { progress "a program" program.log bash -c 'echo $$ >pid; echo >begun; exec sleep 1000'; }
        stage short 5 "" "short one"
    """


def test_a_failure_is_shown_and_ends_the_others(start: Start, beside: str, tmp_path: Path) -> None:
    text = said(
        start(beside + "stage_short() { cat begun; echo out of disk; false; echo never; }; stage after 5 short x"), 1
    )
    assert "FAILED after 0:0" in text
    assert "short one" in text
    assert "    out of disk\n" in text
    assert "never" not in text
    assert not alive(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize("how", (signal.SIGINT, signal.SIGTERM))
def test_ctrl_c_ends_everything(start: Start, beside: str, tmp_path: Path, how: signal.Signals) -> None:
    process = start(beside + "stage_short() { cat begun; echo both run >&3; exec sleep 1000; }; exec 3>&1 >/dev/null")
    assert process.stdout is not None
    assert process.stdout.readline() == "both run\n"
    os.killpg(process.pid, how)
    said(process, 128 + how)
    assert not alive(int((tmp_path / "pid").read_text()))


def test_what_a_stage_took_is_expected_the_next_time(start: Start, times: Path) -> None:
    times.write_text("a 80\nold 7\n")
    text = said(
        start("""
        stage a 40 "" "known";       stage_a() { :; }
        stage b 10 "a" "stretched";  stage_b() { :; }
        stage c 30 "" "beside";      stage_c() { :; }
        stage d 50 "b" "there";      stage_d() { :; }; cached_d() { true; }
        """)
    )
    expected = dict(line.strip().rsplit("  ", 1) for line in text.splitlines()[:4])
    assert {name.strip(): time.strip() for name, time in expected.items()} == {
        "known": "1:20",
        "stretched": "0:20",
        "beside": "1:00",
        "there": "cached, 0:03",
    }
    assert "about 1:43 in all" in text, "the longest way, not the sum"
    kept = dict(line.split() for line in times.read_text().splitlines())
    assert kept.keys() == {"a", "b", "c", "old"}, "what was cached says nothing"
    assert kept["a"] != "80"


def test_the_table_holds_on_a_machine_that_never_ran(start: Start) -> None:
    text = said(start('stage a 90 "" "alone"; stage_a() { :; }'))
    assert "alone" in text
    assert "about 1:30 in all" in text
