"""Which samples make which optimizer step: a function of seed, epoch and line numbers alone, the same on any machine.

Sorting by a hash instead of shuffling keeps the order apart from any library's generator, and addresses it: step n
needs no earlier one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Split:
    """Sample ids (line numbers), ascending; the parts share none."""

    train: tuple[int, ...]
    eval: tuple[int, ...]


def split(ids: Sequence[int], eval_percent: int, seed: int) -> Split:
    """Hold out `eval_percent` of the samples, at least one if it is not 0, and never all."""
    count = min(max(1, round(len(ids) * eval_percent / 100)), len(ids) - 1) if eval_percent else 0
    held_out = set(sorted(ids, key=lambda one: _key(seed, "eval", one))[: max(count, 0)])
    return Split(
        tuple(sorted(one for one in ids if one not in held_out)),
        tuple(sorted(held_out)),
    )


def capped(ids: Sequence[int], most: int | None, seed: int) -> tuple[int, ...]:
    """At most `most` of the samples, ascending; fewer of them are a part of more."""
    if most is None or len(ids) <= most:
        return tuple(ids)
    return tuple(sorted(sorted(ids, key=lambda one: _key(seed, "cap", one))[:most]))


@dataclass(frozen=True)
class StepOrder:
    """The samples of each optimizer step; the last step of an epoch has what is left, as in the Trainer.

    Args:
        ids: the training samples.
        epochs, max_steps: exactly one is set.
    """

    ids: tuple[int, ...]
    batch_size: int
    seed: int
    epochs: int | None
    max_steps: int | None

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.ids) / self.batch_size)

    @property
    def total_steps(self) -> int:
        return self.max_steps if self.max_steps is not None else (self.epochs or 0) * self.steps_per_epoch

    def epoch_of(self, step: int) -> int:
        """The time through the data, from 0, that `step` (from 1) belongs to."""
        return (step - 1) // self.steps_per_epoch

    def batch(self, step: int) -> tuple[int, ...]:
        """The ids of `step`."""
        order = _epoch_order(self.ids, self.seed, self.epoch_of(step))
        begin = (step - 1) % self.steps_per_epoch * self.batch_size
        return order[begin : begin + self.batch_size]


@lru_cache(maxsize=2)
def _epoch_order(ids: tuple[int, ...], seed: int, epoch: int) -> tuple[int, ...]:
    """All training samples in the order of `epoch`."""
    return tuple(sorted(ids, key=lambda one: _key(seed, epoch, one)))


def _key(seed: int, part: object, sample: int) -> bytes:
    return hashlib.sha256(f"{seed}/{part}/{sample}".encode()).digest()
