"""What an iteration is decided from, what is decided, and what came of it: ints, floats and ids only, so
that a simulator can share it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    DECODE = "decode"
    PREFILL = "prefill"
    FINETUNE = "finetune"


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows [start, start + length) of a sequence (`slot`) or of a pass (`slot` is its id; rows of the pass)."""

    kind: Kind
    slot: int
    start: int
    length: int
    sample: bool = False
    """Whether the last row's logits choose a token."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Backward of tiles [first, end) of a pass in one layer; layer = model's layers is the head.

    `end` is where backward stands.
    """

    pass_id: int
    layer: int
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class Plan:
    """An upper bound: the forward runs whole, of the units a prefix runs until the clock passes `until`."""

    id: int
    segments: tuple[Segment, ...]
    units: tuple[Unit, ...]
    until: float
    forward_s: float
    """Predicted time of the forward, in seconds."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What really happened; `unit_s` has one entry for each unit that ran."""

    plan_id: int
    forward_s: float
    unit_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class SequenceView:
    """A running request: `done` tokens are in the cache, `known` tokens are known (prompt and sampled), the
    next token is due at `deadline`.
    """

    slot: int
    done: int
    known: int
    deadline: float
    arrival: float

    @property
    def decoding(self) -> bool:
        return self.known - self.done == 1 and self.done > 0


@dataclass(frozen=True, slots=True)
class PassView:
    """A live pass: tiles as (rows, KV rows seen), and the cursors of forward and backward."""

    id: int
    tiles: tuple[tuple[int, int], ...]
    starts: tuple[int, ...]
    layers: int
    fwd_tile: int
    layer: int
    end_tile: int
    training: bool


@dataclass(frozen=True, slots=True)
class View:
    """All that `decide` may look at."""

    now: float
    sequences: tuple[SequenceView, ...]
    passes: tuple[PassView, ...]
    """Oldest first."""
    waiting: int
    """Requests that have no slot or no pages yet."""
    ttft_s: float
    tpot_s: float
    max_batch_tokens: int
    tile: int
