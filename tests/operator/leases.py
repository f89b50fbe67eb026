"""A Lease in memory whose server can hang, and an event loop whose clock leaps to what is due next."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from copy import deepcopy
from typing import Any

from coserve_operator.kube import ConflictError, NotFoundError, UnavailableError
from coserve_operator.leader import TOKEN, Leader


class LeaseServer:
    """A Kube with one Lease. `fault` is asked before a call and after a write that was carried out."""

    def __init__(self, lease: Any = None) -> None:
        self.lease: Any = lease or {"metadata": {"uid": "l-0", "resourceVersion": "0"}, "spec": {}}
        self.made, self.version = 0, 0
        self.log: list[tuple[str, int]] = []

    @property
    def holder(self) -> str:
        return str(self.lease["spec"].get("holderIdentity", ""))

    @property
    def token(self) -> int:
        return int((self.lease["metadata"].get("annotations") or {}).get(TOKEN, 0))

    async def get(self, *_: Any) -> Any:
        if self.lease is None:
            raise NotFoundError(404, "")
        return deepcopy(self.lease)

    async def create(self, body: Any) -> Any:
        if self.lease is not None:
            raise ConflictError(409, "")
        self.made += 1
        self._put(body, {"uid": f"l-{self.made}"})
        return deepcopy(self.lease)

    async def replace(self, body: Any) -> Any:
        if self.lease is None:
            raise NotFoundError(404, "")
        if body["metadata"]["resourceVersion"] != self.lease["metadata"]["resourceVersion"]:
            raise ConflictError(409, "")
        self._put(body, {})
        self.log.append((self.holder, self.token))
        return deepcopy(self.lease)

    def _put(self, body: Any, metadata: Any) -> None:
        self.version += 1
        metadata = body["metadata"] | metadata | {"resourceVersion": str(self.version)}
        self.lease = deepcopy({"metadata": metadata, "spec": body["spec"]})


class Access:
    """One replica's way to the server, which may hang, be slow, be cut, or lose an answer."""

    def __init__(self, server: LeaseServer) -> None:
        self.server = server
        self.hangs: tuple[str, ...] = ()
        self.slow_s, self.away, self.loses_answers = 0.0, False, False

    async def _call(self, word: str, *arguments: Any) -> Any:
        await asyncio.sleep(self.slow_s)
        if word in self.hangs:
            await asyncio.Event().wait()
        if self.away:
            raise UnavailableError(0, "away")
        answer = await getattr(self.server, word)(*arguments)
        if self.loses_answers and word == "replace":
            raise UnavailableError(0, "the answer was lost")
        return answer

    async def get(self, *arguments: Any) -> Any:
        return await self._call("get", *arguments)

    async def create(self, body: Any) -> Any:
        return await self._call("create", body)

    async def replace(self, body: Any) -> Any:
        return await self._call("replace", body)


def replica(server: LeaseServer, name: str) -> tuple[Leader, Access]:
    access = Access(server)
    return Leader(access, "ns", "l", name), access  # type: ignore[arg-type]


class _Leaping(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        found = super().select(0 if timeout is not None else None)
        if not found and timeout:
            self.now += timeout
        return found


def leap(seconds: float) -> None:
    """Let time go by in which nothing runs."""
    asyncio.get_running_loop()._selector.now += seconds  # type: ignore[attr-defined]


def now() -> float:
    return asyncio.get_running_loop().time()


def in_virtual_time(scenario: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Run a scenario; waiting costs nothing."""

    def made() -> asyncio.AbstractEventLoop:
        selector = _Leaping()
        loop = asyncio.SelectorEventLoop(selector)
        loop.time = lambda: selector.now  # type: ignore[method-assign]
        return loop

    with asyncio.Runner(loop_factory=made) as runner:
        return runner.run(scenario())
