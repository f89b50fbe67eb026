"""How the samples of an optimizer step become passes: a function of the data alone, never of load, so that a replay
is exact.
"""

from __future__ import annotations

from collections.abc import Sequence

from coserve_api.shards import Sample
from coserve_engine.messages import TrainSeq

PASS_TOKENS = 512


def split_passes(samples: Sequence[Sample], pass_tokens: int = PASS_TOKENS) -> list[tuple[Sample, ...]]:
    """Whole samples in order, as many to a pass as fit `pass_tokens`; a longer sample is a pass of its own."""
    passes: list[tuple[Sample, ...]] = []
    current: list[Sample] = []
    tokens = 0
    for sample in samples:
        if current and tokens + len(sample.tokens) > pass_tokens:
            passes.append(tuple(current))
            current, tokens = [], 0
        current.append(sample)
        tokens += len(sample.tokens)
    return [*passes, tuple(current)] if current else passes


def weight_sum(samples: Sequence[Sample]) -> float:
    """Supervised tokens of a step: what its loss is the mean over. The first token of a sample is never predicted."""
    return sum(sum(sample.weights[1:]) for sample in samples)


def to_seqs(samples: Sequence[Sample], divisor: float, epoch: int = 0) -> tuple[TrainSeq, ...]:
    """Samples for the engine, which only sums: the weights are divided by `divisor` here."""
    return tuple(
        TrainSeq(
            sample.id, sample.tokens, tuple(weight / divisor for weight in sample.weights), epoch, turn=sample.turn
        )
        for sample in samples
    )
