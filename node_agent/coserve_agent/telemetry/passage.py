"""Where a token waited on its way to the client, and why a promise was missed."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from coserve_engine.messages import Emission


class Cause(StrEnum):
    """Why a first token, or a gap, was late."""

    OVER_BOUND = "over_bound"
    """The iteration took longer than its plan allowed for."""
    PAUSED = "paused"
    """The machine gave the engine's core away; without that it would have been in time."""
    WAITED = "waited"
    """For a place, for pages, or behind more decode rows than the gap bears: overload."""
    PREFILL = "prefill"
    """Prompts were computed: its own before its first token, or others' between two of its tokens."""
    DELIVERY = "delivery"
    """The engine had it in time; pipe, event loop or transport had not."""
    CLIENT = "client"
    """The client did not read; such time is not counted against the promise."""


class Passage(NamedTuple):
    """One token: when the engine had it, the reading thread of the agent, its event loop; and how its forward went.
    Seconds of time.monotonic().
    """

    emitted_s: float
    received_s: float
    routed_s: float
    emission: Emission


def cause_of_gap(before: Passage, passage: Passage, gap_s: float, tpot_s: float) -> Cause:
    """Of a gap of `gap_s` > `tpot_s` at the transport, which ends with `passage`."""
    engine_s = passage.emitted_s - before.emitted_s
    emission = passage.emission
    if engine_s <= tpot_s:
        return Cause.DELIVERY
    if engine_s - (emission.paused_s - before.emission.paused_s) <= tpot_s:
        return Cause.PAUSED
    if engine_s - emission.late_s > tpot_s:  # the plan itself was for a later time
        return Cause.PREFILL if emission.prefilled else Cause.WAITED
    return Cause.OVER_BOUND


def cause_of_first(passage: Passage, arrival_s: float, placed_s: float, paused_s: float, ttft_s: float) -> Cause:
    """Of a first token that came later than `ttft_s` after its arrival; `paused_s`: the pauses until its arrival."""
    engine_s = passage.emitted_s - arrival_s
    if engine_s <= ttft_s:
        return Cause.DELIVERY
    if engine_s - (passage.emission.paused_s - paused_s) <= ttft_s:
        return Cause.PAUSED
    return Cause.WAITED if placed_s - arrival_s > passage.emitted_s - placed_s else Cause.PREFILL


@dataclass(frozen=True, slots=True)
class RequestPath:
    """A request that has ended: why it missed its promise, if it did, and of each token when the engine had it, the
    reading thread, the event loop and the transport.
    """

    name: str
    arrival_s: float
    cause: Cause | None
    times: tuple[tuple[float, float, float, float], ...]


class PathLog:
    """The last requests, for /debug/requests: as many as have `tokens` tokens together."""

    def __init__(self, tokens: int = 20_000) -> None:
        self._most = tokens
        self._held = 0
        self._ring: deque[RequestPath] = deque()

    def add(self, path: RequestPath) -> None:
        self._ring.append(path)
        self._held += len(path.times)
        while self._held > self._most:
            self._held -= len(self._ring.popleft().times)

    def since(self, arrival_s: float) -> list[dict[str, Any]]:
        """Those that arrived after `arrival_s` (monotonic seconds of this machine), in the order of their ends."""
        return [
            {"id": path.name, "arrival": path.arrival_s, "cause": path.cause, "tokens": path.times}
            for path in tuple(self._ring)
            if path.arrival_s > arrival_s
        ]
