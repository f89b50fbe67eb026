"""What a person reads: colours and bars in a terminal, plain lines elsewhere, both on standard error, so that standard
output holds what was asked for and nothing else.
"""

from __future__ import annotations

import logging
import sys

from rich.console import Console

from coserve_agent.main import log_to_stderr

console = Console(stderr=True, highlight=False, soft_wrap=True)
"""rich honours NO_COLOR, and knows whether this is a terminal."""


def say(text: str) -> None:
    """One line, as it is: no markup is read in it."""
    console.print(text, markup=False)


def say_log(verbose: bool) -> None:
    """The log of server and engine: all of it, or what is wrong."""
    log_to_stderr()
    if not verbose:
        logging.getLogger().setLevel(logging.WARNING)
        logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s: %(message)s", force=True)


def size(count: float) -> str:
    """Bytes for a person: 1.5 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """1:02:03, 2:03 or 0:03."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
