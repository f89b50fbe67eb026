"""`python -m coserve_agent.main`: the agent's process.

The engine's process imports this module again, so it imports nothing heavy at its top.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from pathlib import Path

log = logging.getLogger(__name__)

TERMINATION_LOG = Path("/dev/termination-log")


def main() -> None:
    """Run until SIGTERM; exit status 1 with one clear message where it cannot run."""
    log_to_stderr()
    sys.exit(asyncio.run(_run()))


def log_to_stderr() -> None:
    """One line an event."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


async def _run() -> int:
    from coserve_agent.agent import Agent  # noqa: PLC0415 (see above)
    from coserve_agent.errors import StartError  # noqa: PLC0415
    from coserve_agent.priority import take_short_turns  # noqa: PLC0415
    from coserve_agent.settings import AgentSettings, read  # noqa: PLC0415

    take_short_turns()
    try:
        agent = Agent(read(AgentSettings))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, agent.stop)
        return await agent.run()
    except StartError as error:
        return give_up(str(error))


def give_up(message: str) -> int:
    """Say why where people look: the log and the pod's status. Returns the exit status."""
    log.critical("cannot start: %s", message)
    if TERMINATION_LOG.exists():
        TERMINATION_LOG.write_text(message[:4096], encoding="utf-8")
    return 1


if __name__ == "__main__":
    main()
