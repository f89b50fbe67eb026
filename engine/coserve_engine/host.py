"""The engine in a process of its own, behind a queue of commands and a pipe of events.

The agent never waits for the engine. The engine writes its events itself: a queue's thread would have to win the
interpreter and a core from the computing one for each token, which takes tens of milliseconds on a busy machine. It
waits for the agent only while PIPE_BYTES are unread.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import logging
import multiprocessing
import os
import queue
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.queues import Queue
from pathlib import Path
from typing import TYPE_CHECKING

from coserve_engine.config import DeviceChoice, EngineConfig
from coserve_engine.errors import EngineError
from coserve_engine.latency.pauses import PauseClock
from coserve_engine.messages import AddRequest, Command, EngineFailed, Event, Shutdown

if TYPE_CHECKING:
    from coserve_engine.engine import Engine

log = logging.getLogger(__name__)

IDLE_S = 0.25
"""How long an idle engine sleeps at most between load reports."""
WAIT_S = 0.002
"""How long an engine sleeps that waits for files only."""
PIPE_BYTES = 1 << 20
INTEL = "GenuineIntel"
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def _processor() -> str:
    """What the kernel says of it; nothing where it says nothing."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def on_intel() -> bool:
    """Whether the processor is known to be Intel's."""
    return INTEL in _processor()


def set_environment(threads: int = 1, dtype: str = "float32") -> None:
    """Set what torch and MKL read when they begin, where it is not set: to be called before torch is used.

    Weights, keys and values lie in huge pages where the kernel grants them (1.1 to 1.2 times as fast in decode on a
    virtual machine, where each address is looked up twice). On Intel's processors MKL would split the sums of few rows
    over threads, and add them up in another order without AVX-512 or in float64: it is asked for one order, however
    many rows or threads there are (conditional numerical reproducibility, strict). In float32 with one thread and
    AVX-512 oneDNN has the wide weights, and strict sums would only take longer. A GPU's memory is taken in segments
    that grow, so that what one iteration freed holds whatever the next needs.
    """
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    processor = _processor()
    if INTEL in processor and (threads > 1 or dtype != "float32" or "avx512f" not in processor):
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


YIELDS = 5
"""How nice an engine is: it takes all it gets of its core, and after a pause it would be its turn for long, while the
process that hands its tokens on waits. In a pod it gives way to nobody else: between pods their requests decide.
"""


SWITCH_S = 5e-4
"""For how long a thread that works on files keeps the interpreter from an iteration, which lets go of it in each call
of torch and has to wait for it again: with Python's 5 ms twenty products of 0.4 ms took 21 ms, with this 13.
"""


def settle() -> None:
    """Take all that was loaded so far out of the garbage collector's rounds, and let threads take shorter turns.

    With the libraries' objects in it a full round takes 100 ms and more, and every client sees that as a gap.
    """
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(SWITCH_S)


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """What is started here never sees a Ctrl-C, which reaches a terminal's whole group, not even while it imports."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class EngineHost:
    """The parent's end. Events come in batches: an iteration's tokens when it has them, the rest at its end."""

    def __init__(self, config: EngineConfig, choice: DeviceChoice | None, log_level: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._commands: Queue[Command] = context.Queue()
        self._events, self._engines_end = context.Pipe(duplex=False)
        with contextlib.suppress(PermissionError):  # no more than the system's limit for all pipes of a user
            fcntl.fcntl(self._events.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._process = context.Process(
            target=_main,
            args=(config, choice, self._commands, self._engines_end, log_level),
            name="coserve-engine",
            daemon=True,
        )

    @classmethod
    def start(
        cls, config: EngineConfig, choice: DeviceChoice | None = None, log_level: int = logging.INFO
    ) -> EngineHost:
        """Start the process. Its first event is EngineReady or EngineFailed.

        Args:
            choice: settles what of `config` depends on the device, in the engine's process, which has torch; None:
                `config` is taken as it is.
            log_level: of the process's log on standard error.
        """
        host = cls(config, choice, log_level)
        with _no_interrupts():
            host._process.start()
        host._engines_end.close()  # or the end of the process would not be seen
        return host

    def submit(self, command: Command) -> None:
        """Hand over a command; never blocks."""
        self._commands.put(command)

    def events(self, timeout_s: float) -> list[Event]:
        """The next batch of events, or none after `timeout_s` or where the process has ended and all is read. Blocks:
        call it in a thread.

        Raises:
            OSError: the process ended within a batch.
        """
        try:
            batch: list[Event] = self._events.recv() if self._events.poll(timeout_s) else []
        except EOFError:
            return []
        return batch

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def close(self, timeout_s: float = 10.0) -> None:
        """Ask the process to end, and end it where it does not."""
        if self._process.is_alive():
            self.submit(Shutdown())
        self._process.join(timeout_s)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._commands.cancel_join_thread()
        self._commands.close()
        self._events.close()


class _Inbox:
    """Commands as they come, with a look ahead for requests so that backward units can stop for them."""

    def __init__(self, commands: Queue[Command]) -> None:
        self._commands = commands
        self._ahead: list[Command] = []

    def drain(self, timeout_s: float) -> Iterator[Command]:
        """All commands that are there; waits up to `timeout_s` for the first."""
        ahead, self._ahead = self._ahead, []
        yield from ahead
        try:
            yield self._commands.get(timeout=timeout_s) if timeout_s > 0 and not ahead else self._commands.get_nowait()
            while True:
                yield self._commands.get_nowait()
        except queue.Empty:
            return

    def request_came(self) -> bool:
        while not self._commands.empty():
            try:
                self._ahead.append(self._commands.get_nowait())
            except queue.Empty:
                break
        return any(isinstance(command, AddRequest) for command in self._ahead)


def _main(
    config: EngineConfig, choice: DeviceChoice | None, commands: Queue[Command], events: Connection, log_level: int
) -> None:
    set_environment(config.threads, config.dtype)
    os.nice(YIELDS)  # before torch starts threads
    logging.basicConfig(level=log_level, stream=sys.stderr, format=LOG_FORMAT)  # loading takes minutes, or fails
    from coserve_engine import startup  # noqa: PLC0415  (torch belongs to this process, not to its parent)
    from coserve_engine.engine import Engine  # noqa: PLC0415

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # blocked so far; those that it starts ignore it, too
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        chosen = startup.Chosen(config) if choice is None else startup.prepare(config, choice)
        config = chosen.config
        engine = Engine(config, paused=PauseClock(alone=config.threads == 1 and config.device == "cpu"))
        ready = engine.ready()
        ready = replace(ready, notes=(*chosen.notes, *ready.notes), device=chosen.device)
        settle()
        events.send([ready])
        _serve(engine, commands, events)
    except BrokenPipeError:
        return  # whoever started it is gone
    except EngineError as error:
        events.send([EngineFailed(str(error))])
    except Exception as error:
        log.exception("the engine's own mistake")
        events.send([EngineFailed(startup.explained(error))])


def _serve(engine: Engine, commands: Queue[Command], events: Connection) -> None:
    inbox = _Inbox(commands)
    parent = multiprocessing.parent_process()
    while not engine.closed and (parent is None or parent.is_alive()):
        for command in inbox.drain(IDLE_S if engine.idle else 0.0):
            engine.submit(command)
        batch = engine.step(inbox.request_came, events.send)
        if batch:
            events.send(batch)
        elif not engine.idle and not engine.busy:
            for command in inbox.drain(WAIT_S):
                engine.submit(command)
