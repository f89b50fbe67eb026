"""What counts as a pause of the machine, on this machine: a neighbour takes the core of a thread that computes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

from coserve_engine.latency.pauses import PauseClock

SPIN = """
import os, sys, time
os.sched_setaffinity(0, {int(sys.argv[1])})
end = time.monotonic() + 0.6
while time.monotonic() < end:
    pass
"""


def spin(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


@pytest.mark.parametrize("alone", (True, False))
def test_a_neighbour_on_the_core_is_a_pause(alone: bool) -> None:
    def measure() -> None:
        core = min(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {core})  # of this thread alone
        clock = PauseClock(alone=alone)
        with subprocess.Popen([sys.executable, "-c", SPIN, str(core)]) as neighbour:
            while neighbour.poll() is None:
                spin(0.01)
        paused.append(clock())

    paused: list[float] = []
    thread = threading.Thread(target=measure)
    thread.start()
    thread.join()
    assert paused[0] > 0.1  # the neighbour had about half of 0.6 s


def test_computing_is_none() -> None:
    clock = PauseClock(alone=True)
    before_s, began_s = clock(), time.monotonic()
    spin(0.2)
    wall_s, paused_s = time.monotonic() - began_s, clock() - before_s
    assert paused_s == pytest.approx(wall_s - 0.2, abs=0.05)


def test_waiting_for_another_thread_counts_only_for_one_that_computes_alone() -> None:
    alone, beside = PauseClock(alone=True), PauseClock(alone=False)
    threading.Event().wait(0.2)
    assert alone() > 0.15
    assert beside() < 0.15


def test_it_never_goes_back() -> None:
    clock = PauseClock(alone=False)
    seen = [clock() for _ in range(50)]
    assert seen == sorted(seen) and seen[0] >= 0.0
