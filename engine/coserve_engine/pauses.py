"""The machine's pauses: time in which the engine could have computed and no core was given to it, because another
process had it (run-queue delay), its cgroup's quota was used up, or the host gave it to another guest (steal).
"""

from __future__ import annotations

import time
from pathlib import Path

THREADS = Path("/proc/self/task")


class PauseClock:
    """Seconds of all pauses since it was made; to be called by the thread that computes, and by no other.

    A thread that computes alone waits for nothing but a core, so what it did not run, it was paused: that holds all
    three kinds. With several threads, or a device beside, it waits for these as well; then the run-queue delay of the
    thread that waited longest counts (/proc/self/task/*/schedstat, which includes quotas and, where the host tells of
    it, steal).
    """

    def __init__(self, *, alone: bool) -> None:
        self._alone = alone
        self._total_s = 0.0
        self._last_s = self._idle_s() if alone else 0.0
        self._delays = {} if alone else self._run_queue_delays()

    def __call__(self) -> float:
        if self._alone:
            idle_s = self._idle_s()
            self._total_s += max(0.0, idle_s - self._last_s)
            self._last_s = idle_s
        else:
            delays = self._run_queue_delays()
            grown = [ns - self._delays.get(thread, ns) for thread, ns in delays.items()]
            self._total_s += max(grown, default=0) / 1e9
            self._delays = delays
        return self._total_s

    @staticmethod
    def _idle_s() -> float:
        """Wall clock less the time that this thread ran; grows while it does not."""
        return time.monotonic() - time.thread_time()

    @staticmethod
    def _run_queue_delays() -> dict[str, int]:
        """Nanoseconds that each thread has waited for a core; empty where the kernel does not say."""
        found: dict[str, int] = {}
        try:
            threads = list(THREADS.iterdir())
        except OSError:
            return found
        for thread in threads:
            try:
                found[thread.name] = int((thread / "schedstat").read_bytes().split()[1])
            except (OSError, ValueError, IndexError):  # it has just ended, or the kernel counts nothing
                continue
        return found
