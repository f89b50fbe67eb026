"""Short turns are the loop's alone: what it starts has the usual ones."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import subprocess
import sys

import pytest

from coserve_agent.priority import TURN_NS

SCHED_GETATTR = {"x86_64": 315, "aarch64": 275}
RELEASE = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])

SCRIPT = """
import subprocess, sys
from coserve_agent.priority import take_short_turns
take_short_turns()
child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
print(child.pid, flush=True)
sys.stdin.read()
child.communicate()
"""


def turn_ns(pid: int) -> int:
    found = ctypes.create_string_buffer(56)
    assert ctypes.CDLL(None).syscall(SCHED_GETATTR[platform.machine()], pid, found, 56, 0) == 0
    return int(struct.unpack_from("=IIQiIQ", found.raw)[5])


@pytest.mark.skipif(platform.machine() not in SCHED_GETATTR or RELEASE < (6, 12), reason="needs Linux 6.12")
def test_the_process_gets_short_turns_and_its_children_do_not() -> None:
    usual_ns = turn_ns(os.getpid())
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert turn_ns(process.pid) == TURN_NS != usual_ns
        assert turn_ns(child) == usual_ns
        process.communicate()
