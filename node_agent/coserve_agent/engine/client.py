"""The asyncio side of the engine process: one thread reads its events, the loop routes them to whoever waits.

Nothing here blocks on the engine: commands go into its queue, and events wait in the buffer of their receiver. A
request's buffer is bounded by its own max_tokens, so a client that reads slowly holds up nobody.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from coserve_agent.engine.pass_bounds import PassBounds
from coserve_agent.errors import AgentError, EngineGoneError
from coserve_agent.telemetry.passage import Passage
from coserve_engine.messages import (
    AdapterFailed,
    AdapterLoaded,
    AdapterVersion,
    AddRequest,
    Cancel,
    Command,
    CopyAdapter,
    EngineFailed,
    EngineReady,
    Event,
    IterationDone,
    JobEvent,
    LoadAdapter,
    LoadReport,
    PromptDone,
    RequestFailed,
    Token,
    TokenBatch,
    UnloadAdapter,
)

log = logging.getLogger(__name__)

POLL_S = 0.25


class EngineProcess(Protocol):
    """What the agent needs of coserve_engine.host.EngineHost."""

    def submit(self, command: Command) -> None: ...

    def events(self, timeout_s: float) -> list[Event]: ...

    @property
    def alive(self) -> bool: ...

    def close(self) -> None: ...


class RefusedError(AgentError):
    """The engine refuses one request; `code` and `field` are RequestFailed's."""

    def __init__(self, code: str, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.field = field


class AdapterLoadError(AgentError):
    """The engine could not load an adapter folder."""


class TokenStream:
    """The tokens of one request, in order. Close it: that frees what the engine still holds for it."""

    def __init__(self, client: EngineClient, request_id: str, observe: Callable[[Passage], None]) -> None:
        self._client = client
        self._request_id = request_id
        self._observe = observe
        self._tokens: list[Token] = []
        self._error: Exception | None = None
        self._arrived = asyncio.Event()
        self.prompt: PromptDone | None = None
        """What the engine says of the prompt; there before the first token."""
        self.started = False
        self.finished = False

    async def next_tokens(self) -> list[Token]:
        """All tokens that came since the last call, at least one; empty once the last was handed out.

        Raises:
            RefusedError: the engine cannot run the request.
            EngineGoneError: the engine ended.
        """
        while not self._tokens:
            if self._error is not None:
                raise self._error
            if self.finished:
                return []
            await self._arrived.wait()
            self._arrived.clear()
        tokens, self._tokens = self._tokens, []
        return tokens

    def close(self) -> None:
        self._client.forget(self._request_id, cancel=not self.finished)
        self.finished = True

    def deliver(self, token: Token, passage: Passage) -> None:
        self.started = True
        self._tokens.append(token)
        self._observe(passage)
        self.finished = token.finish is not None
        self._arrived.set()

    def fail(self, error: Exception) -> None:
        self.finished = True
        self._error = error
        self._arrived.set()


class JobChannel:
    """Commands into one job and its events out, in order."""

    def __init__(self, client: EngineClient, job: str) -> None:
        self._client = client
        self.job = job
        self.events: asyncio.Queue[JobEvent | EngineGoneError] = asyncio.Queue()

    def submit(self, command: Command) -> None:
        self._client.submit(command)

    async def next_event(self) -> JobEvent:
        event = await self.events.get()
        if isinstance(event, EngineGoneError):
            self.events.put_nowait(event)
            raise event
        return event

    def close(self) -> None:
        self._client.close_job(self.job)


class EngineClient:
    """Routes between the engine process and the asyncio tasks of the agent.

    `on_iteration` and `on_load` are called in the loop for every IterationDone and LoadReport.
    """

    def __init__(
        self,
        engine: EngineProcess,
        on_iteration: Callable[[IterationDone], None] = lambda event: None,
        on_load: Callable[[LoadReport], None] = lambda event: None,
    ) -> None:
        self._engine = engine
        self._on_iteration = on_iteration
        self._on_load = on_load
        self._loop = asyncio.get_running_loop()
        self._streams: dict[str, TokenStream] = {}
        self._jobs: dict[str, JobChannel] = {}
        self._loads: dict[AdapterVersion, asyncio.Future[AdapterLoaded]] = {}
        self._ready: asyncio.Future[EngineReady] = self._loop.create_future()
        self._gone: asyncio.Future[EngineGoneError] = self._loop.create_future()
        self._refusal: RefusedError | None = None
        self._closing = False
        self._reader = threading.Thread(target=self._read, name="engine-events", daemon=True)

    def start(self) -> None:
        self._reader.start()

    async def ready(self) -> EngineReady:
        """Wait for the model. Raises EngineGoneError if it cannot be loaded."""
        return await asyncio.shield(self._ready)

    @property
    def vocab_size(self) -> int:
        """Rows of the model's vocabulary; ids from 0 on. The model must be ready."""
        return self._ready.result().vocab_size

    @property
    def device(self) -> str:
        """What the engine computes on; empty while it loads."""
        return self._ready.result().device if self._ready.done() and not self._ready.exception() else ""

    @property
    def pass_bounds(self) -> PassBounds:
        """What passes of its jobs may have at most. The model must be ready."""
        ready = self._ready.result()
        return PassBounds(ready.kv_total_pages, ready.page_tokens, ready.pass_tokens)

    async def gone(self) -> EngineGoneError:
        """Wait until the engine has ended, and say why."""
        return await asyncio.shield(self._gone)

    @property
    def alive(self) -> bool:
        return not self._gone.done()

    def submit(self, command: Command) -> None:
        if self._gone.done():
            raise self._gone.result()
        self._engine.submit(command)

    def generate(self, request: AddRequest, observe: Callable[[Passage], None] = lambda passage: None) -> TokenStream:
        """Begin a request; `observe` hears of each of its tokens, how it came here."""
        stream = TokenStream(self, request.request_id, observe)
        if self._refusal is None:
            self.submit(request)
        else:
            stream.fail(self._refusal)
        self._streams[request.request_id] = stream
        return stream

    def waiting(self) -> int:
        """Requests that have no token yet."""
        return sum(not stream.started for stream in self._streams.values())

    def in_flight(self) -> int:
        return len(self._streams)

    def refuse_rest(self, code: str, message: str) -> None:
        """End every request that is in flight, and any that comes; its client is told."""
        self._refusal = RefusedError(code, message)
        for stream in self._streams.values():
            if not stream.finished:
                stream.fail(self._refusal)

    def forget(self, request_id: str, cancel: bool) -> None:
        known = self._streams.pop(request_id, None) is not None
        if known and cancel and self.alive:
            self._engine.submit(Cancel(request_id))

    async def load_adapter(self, version: AdapterVersion, path: str) -> AdapterLoaded:
        """Raises AdapterLoadError if the folder is no adapter for this model."""
        future = self._loads.get(version)
        if future is None:
            future = self._loads[version] = self._loop.create_future()
            self.submit(LoadAdapter(version, path))
        return await asyncio.shield(future)

    def copy_adapter(self, version: AdapterVersion, job: str) -> asyncio.Future[AdapterLoaded]:
        """Have what `job` trains copied as `version`; requests for it may be sent at once. The future ends as
        `load_adapter` does.
        """
        self.submit(CopyAdapter(version, job))
        future = self._loads[version] = self._loop.create_future()
        return future

    def unload_adapter(self, version: AdapterVersion) -> None:
        self.submit(UnloadAdapter(version))

    def open_job(self, job: str) -> JobChannel:
        if job in self._jobs:
            raise RuntimeError(f"job {job} is open already")
        channel = self._jobs[job] = JobChannel(self, job)
        return channel

    def close_job(self, job: str) -> None:
        self._jobs.pop(job, None)

    async def close(self) -> None:
        """End the thread that reads from the engine process, then the process."""
        self._closing = True
        if self._reader.is_alive():
            await asyncio.to_thread(self._reader.join, 4 * POLL_S)
        await asyncio.to_thread(self._engine.close)
        self._end(EngineGoneError("the agent closed it"))

    async def watch(self) -> None:
        """Notice a process that died within an event, which leaves the reading thread waiting for the rest of it."""
        while not self._gone.done():
            if not self._engine.alive:
                await asyncio.sleep(4 * POLL_S)
                self._end(EngineGoneError("its process was killed"))
            await asyncio.sleep(POLL_S)

    # ---- the reading thread ----

    def _read(self) -> None:
        while not self._closing:
            alive = self._engine.alive  # asked first: what it said before it ended is still read
            try:
                events = self._engine.events(POLL_S)
            except (EOFError, OSError, ValueError) as error:  # the queue was closed, or broken off within an event
                self._call(self._end, EngineGoneError(f"its event queue broke: {error}"))
                return
            if events:
                self._call(self._route_all, events, time.monotonic())
            elif not alive:
                self._call(
                    self._end, EngineGoneError("its process ended without a word; see the log above (out of memory?)")
                )
                return

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    # ---- in the loop ----

    def _route_all(self, events: list[Event], received_s: float) -> None:
        for event in events:
            self._route(event, received_s)

    def _route(self, event: Event, received_s: float) -> None:
        match event:
            case TokenBatch():
                routed_s = time.monotonic()
                for token in event.tokens:
                    if (stream := self._streams.get(token.request_id)) is not None:
                        stream.deliver(token, Passage(token.emitted_s, received_s, routed_s, event.emission))
            case PromptDone():
                if (stream := self._streams.get(event.request_id)) is not None:
                    stream.prompt = event
            case RequestFailed():
                if (stream := self._streams.get(event.request_id)) is not None:
                    stream.fail(RefusedError(event.code, event.message, event.field))
            case IterationDone():
                self._on_iteration(event)
            case LoadReport():
                self._on_load(event)
            case AdapterLoaded():
                self._settle_load(event.version, event)
            case AdapterFailed():
                self._settle_load(event.version, AdapterLoadError(event.message))
            case EngineReady():
                if not self._ready.done():
                    self._ready.set_result(event)
            case EngineFailed():
                self._end(EngineGoneError(event.message))
            case _:
                if (channel := self._jobs.get(event.job)) is not None:
                    channel.events.put_nowait(event)

    def _settle_load(self, version: AdapterVersion, outcome: AdapterLoaded | AdapterLoadError) -> None:
        future = self._loads.pop(version, None)
        if future is None or future.done():
            return
        if isinstance(outcome, AdapterLoaded):
            future.set_result(outcome)
        else:
            future.set_exception(outcome)

    def _end(self, error: EngineGoneError) -> None:
        if self._gone.done():
            return
        self._gone.set_result(error)
        if not self._ready.done():
            self._ready.set_exception(error)
            self._ready.exception()  # read: nobody may be waiting
        for stream in self._streams.values():
            if not stream.finished:
                stream.fail(error)
        for channel in self._jobs.values():
            channel.events.put_nowait(error)
        for future in self._loads.values():
            if not future.done():
                future.set_exception(error)
                future.exception()
        self._loads.clear()
        if not self._closing:
            log.error("engine ended: %s", error)
