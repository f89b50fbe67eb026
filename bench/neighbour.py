"""A neighbour of a replay: takes the core that is its argument for 30 to 120 ms every 2 to 5 s, until it is killed."""

from __future__ import annotations

import os
import random
import sys
import time
from contextlib import suppress

BUSY_S, REST_S = (0.03, 0.12), (2.0, 5.0)


def main() -> None:
    os.sched_setaffinity(0, {int(sys.argv[1])})
    with suppress(PermissionError):  # as root, before everything else; or it only gets its share of the time
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
    source = random.Random(0)
    while os.getppid() != 1:
        time.sleep(source.uniform(*REST_S))
        until_s = time.monotonic() + source.uniform(*BUSY_S)
        while time.monotonic() < until_s:
            pass


if __name__ == "__main__":
    main()
