"""What a forward must know of a sequence whose rows it computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from coserve_engine.kernels.protocol import Adapted
from coserve_engine.layout.batch import Placed
from coserve_engine.layout.choices import Choice, Seen
from coserve_engine.messages import SamplingParams
from coserve_engine.tensors.lora import LoraWeights


class Computable(Placed, Adapted, Protocol):
    """A running request, or what stands for one."""


GREEDY = SamplingParams(max_tokens=1)


@dataclass(frozen=True, slots=True)
class SequenceRows:
    """A sequence that is no request, as those at start-up are. `banned` and `seen`: see `Choice`."""

    tokens: Sequence[int]
    pages: tuple[int, ...]
    weights: LoraWeights | None = None
    scored: int | None = None
    params: SamplingParams = GREEDY
    banned: tuple[int, ...] = ()
    seen: Seen | None = None

    @property
    def adapter(self) -> int | None:
        return None if self.weights is None else id(self.weights)

    def choice(self) -> Choice:
        return Choice(self.params, len(self.tokens), self.banned, self.seen)
