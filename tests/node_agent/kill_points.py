"""`python kill_points.py POINT before|after N`: an agent that is killed around the N-th call of one method, so that
every boundary between what is on the disk and what is not yet can be met.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from coserve_agent.main import main
from coserve_contract.local.binder import LocalBinder
from coserve_contract.local.database import Database
from coserve_contract.local.fencing import LocalFencing
from coserve_contract.local.store import LocalStore

POINTS: dict[str, type] = {
    "write": Database,
    "bind": LocalBinder,
    "take_lease": LocalFencing,
    "accept_checkpoint": LocalFencing,
    "finish": LocalFencing,
    "set_adapters": LocalStore,
}


def killed(method: Callable[..., Awaitable[Any]], when: str, number: int) -> Callable[..., Awaitable[Any]]:
    calls = 0

    async def wrapped(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        now = calls == number
        if now and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = await method(*arguments, **more)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return wrapped


if __name__ == "__main__":
    point, when, number = sys.argv[1:]
    setattr(POINTS[point], point, killed(getattr(POINTS[point], point), when, int(number)))
    main()
