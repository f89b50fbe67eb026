"""The machine's pauses: time in which the engine could have computed and no core was given to it, because another
process had it (run-queue delay), its cgroup's quota was used up, or the host gave it to another guest (steal).
"""

from __future__ import annotations

import os
import time
from pathlib import Path

THREADS = Path("/proc/self/task")
LOOK_S = 1.0
"""Between two looks at which threads there are."""


class PauseClock:
    """Seconds of all pauses since it was made; to be called by the thread that computes, and by no other.

    A thread that computes alone waits for nothing but a core, so what it did not run, it was paused: that holds all
    three kinds. With several threads, or a device beside, it waits for these as well; then the run-queue delay of the
    thread that waited longest counts (schedstat, which includes quotas and, where the host tells of it, steal).
    """

    def __init__(self, *, alone: bool) -> None:
        self._total_s = 0.0
        self._threads = None if alone else _RunQueueDelays()
        self._last_s = self._idle_s()

    def __call__(self) -> float:
        if self._threads is not None:
            self._total_s += self._threads.grown_s()
        else:
            idle_s = self._idle_s()
            self._total_s += max(0.0, idle_s - self._last_s)
            self._last_s = idle_s
        return self._total_s

    @staticmethod
    def _idle_s() -> float:
        """Wall clock less the time that this thread ran; grows while it does not."""
        return time.monotonic() - time.thread_time()


class _RunQueueDelays:
    """How long each thread of this process has waited for a core: /proc/self/task/*/schedstat, kept open."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        self._last_ns: dict[str, int] = {}
        self._looked_s = 0.0
        self.grown_s()

    def grown_s(self) -> float:
        """Since the last call, in seconds: of the thread that waited longest; 0 where the kernel does not say."""
        if time.monotonic() - self._looked_s > LOOK_S:
            self._look()
        longest_ns = 0
        for thread, file in list(self._files.items()):
            try:
                delay_ns = int(os.pread(file, 64, 0).split()[1])
            except (OSError, IndexError):  # it has ended
                os.close(self._files.pop(thread))
                self._last_ns.pop(thread, None)
                continue
            longest_ns = max(longest_ns, delay_ns - self._last_ns.get(thread, delay_ns))
            self._last_ns[thread] = delay_ns
        return longest_ns / 1e9

    def _look(self) -> None:
        self._looked_s = time.monotonic()
        try:
            threads = [path.name for path in THREADS.iterdir()]
        except OSError:
            return
        for thread in threads:
            if thread not in self._files:
                try:
                    self._files[thread] = os.open(THREADS / thread / "schedstat", os.O_RDONLY)
                except OSError:  # it has just ended, or the kernel counts nothing
                    continue
