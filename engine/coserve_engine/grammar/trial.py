"""Compiles grammars to see whether they can be: the program of `sandbox`, which starts it by its path.

Reads from stdin a length (8 bytes, big endian) and so many bytes of a grammar, and writes what is wrong with it in the
same way, nothing where it is fine; until stdin ends. What a grammar takes of time, memory and stack, it takes here
first. The argument is how many seconds of a processor one may take: where others are busy it may last.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
from typing import BinaryIO

MEMORY_BYTES = 2 << 30
"""Of addresses, of which the program itself has 300 MB."""
STACK_BYTES = 1 << 20
"""An eighth of what the engine's own compiler has."""


def serve(asked: BinaryIO, answers: BinaryIO, seconds: float) -> None:
    """Answer until there are no more grammars."""
    import llguidance  # noqa: PLC0415  (in the thread whose stack is small; what it loads is no part of that)

    tokenizer = llguidance.LLTokenizer("byte")
    limits = llguidance.LLParserLimits(verbose_errors=False)
    while head := asked.read(8):
        text = asked.read(int.from_bytes(head, "big")).decode()
        signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF ends the process
        matcher = llguidance.LLMatcher(tokenizer, text, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()
        signal.setitimer(signal.ITIMER_PROF, 0)
        wrong = matcher.get_error().encode()
        answers.write(len(wrong).to_bytes(8, "big") + wrong)
        answers.flush()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with its stdin
    os.nice(5)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=serve, args=(sys.stdin.buffer, sys.stdout.buffer, float(sys.argv[1])))
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
