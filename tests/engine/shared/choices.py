"""Choices bound and drawn from logits, without a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st

from coserve_engine.device.cpu import CpuDevice
from coserve_engine.device.protocol import Columns
from coserve_engine.kernels import sampling
from coserve_engine.kernels.sampling import CANDIDATES, BoundChoices, Draw, process, widening
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

    def choose(self, logits: torch.Tensor, choices: Sequence[Choice], draw: Draw = widening) -> list[int]:
        tokens = sampling.choose(logits, bound(choices, self.vocab), self.counts, draw)
        found: list[int] = tokens.tolist()
        return found


def choose(logits: torch.Tensor, choices: Sequence[Choice], draw: Draw = widening) -> list[int]:
    """Of rows without penalties."""
    return Requests(logits.shape[1]).choose(logits, choices, draw)


def kept(p: Sequence[float], top_k: int, top_p: float) -> list[int]:
    """What top_k (0: all) and then top_p leave, in the order of ids, by the definition: the likelier first, of equal
    ones that of the lower id.
    """
    order = sorted(range(len(p)), key=lambda token: (-p[token], token))[: top_k or None]
    total, found, mass = math.fsum(p[token] for token in order), order[:1], p[order[0]]
    for token in order[1:]:
        if mass >= top_p * total:
            break
        found.append(token)
        mass += p[token]
    return sorted(found)


def turns(p: Sequence[float], tokens: Sequence[int]) -> tuple[list[int], list[float]]:
    """Those of `tokens` that can be drawn, and for each the number in the middle of its part of their sum, in order."""
    some = [token for token in tokens if p[token] > 0]
    total, begin, found = math.fsum(p[token] for token in some), 0.0, []
    for token in some:
        found.append((begin + p[token] / 2) / total)
        begin += p[token]
    return some, found


@st.composite
def rows_with_ties(draw: st.DrawFn) -> tuple[torch.Tensor, SamplingParams]:
    """p [vocab] of few different values, sums of which are exact, and how it is cut."""
    vocab = draw(st.sampled_from((2, 9, 40, CANDIDATES, CANDIDATES + 1, 700)))
    values = draw(st.sampled_from(([0, 1, 2, 8], [1], [1, 1 + 2**-20], [0, 0, 0, 4], [2**-9, 1, 64])))
    pick = torch.randint(len(values), (vocab,), generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    p = torch.tensor(values, dtype=torch.float32)[pick]
    p[draw(st.integers(0, vocab - 1))] = float(max(values))
    params = SamplingParams(
        1,
        temperature=1.0,
        top_k=draw(st.sampled_from((0, 1, 3, vocab // 2, min(vocab - 1, CANDIDATES), vocab - 1))),
        top_p=draw(st.sampled_from((0.0, 0.33, 0.71, 0.999, 1.0))),
    )
    return p / 2.0 ** round(float(p.sum().log2())), params


def drawn(draw: Draw, p: torch.Tensor, params: SamplingParams, u: Sequence[float]) -> list[int]:
    """A token for each u, from the same p [vocab]."""
    padded = [*u, *[0.0] * (-len(u) % 4)]
    choices = bound([Choice(params, n) for n in range(len(padded))], p.shape[0])
    several, at = p.expand(len(padded), -1).contiguous(), torch.tensor(padded, dtype=torch.float64)
    found: list[int] = draw(several, choices, at.unsqueeze(1))[: len(u)].tolist()
    return found
