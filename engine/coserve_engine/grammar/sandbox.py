"""A process in which a grammar is compiled first, so that one which takes too long, too much memory or too deep a stack
ends that and not the engine: native code can be given no time limit in a thread.
"""

from __future__ import annotations

import contextlib
import select
import signal
import subprocess
import sys
import weakref
from pathlib import Path

from coserve_engine.errors import RequestError
from coserve_engine.grammar.source import refused

PROGRAM = Path(__file__).with_name("trial.py")
SECONDS = 5.0
"""Of a processor, for one grammar; most take some milliseconds."""
LOOKS = 20
"""So many times as long it may last: a process may be kept from its processor, and both may be stopped meanwhile."""


class Sandbox:
    """Of one thread. Its process starts with the first grammar, and after one that ended it."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def wrong(self, source: str) -> str:
        """What llguidance says is wrong with a grammar's text; nothing where it is fine.

        Raises:
            RequestError: it took too long, or more than a grammar may have, or there is no process to be had.
        """
        try:
            process = self._started()
        except OSError as error:
            said = f"the process that compiles grammars cannot be started ({error}); try again later"
            raise RequestError("internal_error", said, "grammar") from None
        try:
            return self._answer(process, source.encode())
        except TimeoutError:
            raise self._too_long() from None
        except (EOFError, BrokenPipeError):
            if process.wait() == -signal.SIGPROF:
                raise self._too_long() from None
            raise refused("takes more memory, or is deeper, than the compiler may go; make it simpler") from None
        finally:
            if process is not self._process:
                _end(process)

    def _too_long(self) -> RequestError:
        return refused(f"takes longer than {self._seconds:g} s to compile; make it simpler")

    def _answer(self, process: subprocess.Popen[bytes], text: bytes) -> str:
        """The process is given up unless it answers."""
        self._process = None
        assert process.stdin is not None and process.stdout is not None  # they are pipes
        left = memoryview(len(text).to_bytes(8, "big") + text)
        while left:
            left = left[process.stdin.write(left) :]
        length = int.from_bytes(self._read(process, 8), "big")
        wrong = self._read(process, length).decode(errors="replace")
        self._process = process
        return wrong

    def _read(self, process: subprocess.Popen[bytes], count: int) -> bytes:
        assert process.stdout is not None  # it is a pipe
        found, pipe = b"", select.poll()
        pipe.register(process.stdout, select.POLLIN)
        while len(found) < count:
            if not any(pipe.poll(1e3 * self._seconds) for _ in range(LOOKS)):
                raise TimeoutError
            part = process.stdout.read(count - len(found))
            if not part:
                raise EOFError
            found += part
        return found

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            command, pipe = [sys.executable, str(PROGRAM), str(self._seconds)], subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, bufsize=0)
            weakref.finalize(self, _end, self._process)
        return self._process


def _end(process: subprocess.Popen[bytes]) -> None:
    """It is gone when this returns."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
