"""When a job that met a fault is tried again: as a container that crashes (the kubelet's CrashLoopBackOff), the first
attempt at once, then after 10 s, doubled up to 5 minutes.
"""

from __future__ import annotations

from coserve_api.job_status import FailedReason

FIRST_WAIT_S, LONGEST_WAIT_S = 10, 300
COUNTED = (FailedReason.INTERNAL_ERROR,)
"""Why an agent may have given a job back that the job, or our own program, is to blame for. All else is the world's."""


def wait_s(attempts: int) -> int:
    """How long to wait after so many faults in a row, without a checkpoint in between."""
    return 0 if attempts <= 1 else min(FIRST_WAIT_S << min(attempts - 2, 10), LONGEST_WAIT_S)
