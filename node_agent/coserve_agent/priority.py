"""The agent's loop runs for a few hundred microseconds at a time and hands on what users wait for; the engine beside it
takes all it gets. Linux 6.12 and newer let a process ask for short turns: it gets no more of the time, but its turns
come sooner (EEVDF: the deadline of a turn is its length away).
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import struct

log = logging.getLogger(__name__)

TURN_NS = 100_000
"""The shortest that the kernel grants."""
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
_SIZE, _POLICY_OTHER, _RESET_ON_FORK = 48, 0, 1


def take_short_turns() -> None:
    """For this thread, not for the processes that it starts. Older kernels, and sandboxes that forbid it, go on as they
    are.
    """
    number = _SCHED_SETATTR.get(platform.machine())
    if number is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return
    # struct sched_attr (sched_setattr(2)): size, policy, flags, nice, priority, runtime, deadline, period
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = struct.pack("=IIQiIQQQ", _SIZE, _POLICY_OTHER, _RESET_ON_FORK, nice, 0, TURN_NS, 0, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(number, 0, attributes, 0) != 0:
        log.info("agent: no short turns from this kernel: %s", os.strerror(ctypes.get_errno()))
