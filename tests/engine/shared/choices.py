"""Choices bound and drawn from logits, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from coserve_engine.device.cpu import CpuDevice
from coserve_engine.device.protocol import Columns
from coserve_engine.kernels import sampling
from coserve_engine.kernels.sampling import BoundChoices, Likeliest, process, widening
from coserve_engine.layout.choices import Choice, ChoiceLayout, Seen
from coserve_engine.messages import SamplingParams
from coserve_engine.tensors.counts import TokenCounts

ROOM = 8
CPU = CpuDevice(torch.device("cpu"))


def bound(choices: Sequence[Choice], vocab: int) -> BoundChoices:
    columns = Columns()
    made = BoundChoices.put(ChoiceLayout.of(choices, vocab, 4), columns)
    return made(CPU.stage_columns(columns))


@dataclass
class Requests:
    """Requests that have said something, and how their next token is chosen."""

    vocab: int
    prompt: tuple[int, ...] = (0,)
    output: tuple[int, ...] = ()
    enders: tuple[int, ...] = ()
    counts: TokenCounts = field(init=False)

    def __post_init__(self) -> None:
        self.counts = TokenCounts(self.vocab, CPU)

    def choice(self, params: SamplingParams, position: int = 0, output: tuple[int, ...] | None = None) -> Choice:
        """Of a request that said `output`."""
        said = self.output if output is None else output
        banned = self.enders if len(said) < params.min_tokens else ()
        place, first = self.counts.take(self.prompt, said, len(said) + ROOM)
        return Choice(params, position, banned, Seen(place, first + len(said)))

    def processed(self, logits: torch.Tensor, choices: Sequence[Choice]) -> torch.Tensor:
        return process(logits, bound(choices, self.vocab), self.counts)

    def choose(self, logits: torch.Tensor, choices: Sequence[Choice], likeliest: Likeliest = widening) -> list[int]:
        tokens = sampling.choose(logits, bound(choices, self.vocab), self.counts, likeliest)
        found: list[int] = tokens.tolist()
        return found


def choose(logits: torch.Tensor, choices: Sequence[Choice], likeliest: Likeliest = widening) -> list[int]:
    """Of rows without penalties."""
    return Requests(logits.shape[1]).choose(logits, choices, likeliest)
