"""How the samples of an optimizer step become passes: a function of the data and of what the engine says at readiness
(pages of its pool, tokens of a pass), never of load, so that a replay is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from coserve_agent.engine.pass_bounds import PassBounds
from coserve_agent.errors import JobFailedError
from coserve_api.job_status import FailedReason
from coserve_contract.shards import Sample
from coserve_engine.messages import TrainSeq


def split_passes(samples: Iterable[Sample], bounds: PassBounds) -> list[tuple[Sample, ...]]:
    """All that `passes_of` gives."""
    return list(passes_of(samples, bounds))


def passes_of(samples: Iterable[Sample], bounds: PassBounds) -> Iterator[tuple[Sample, ...]]:
    """Whole samples in order, as many to a pass as fit `bounds`; a larger sample is a pass of its own."""
    current: list[Sample] = []
    tokens = pages = 0
    for sample in samples:
        tokens, pages = tokens + len(sample.tokens), pages + bounds.pages_of(sample)
        if current and (tokens > bounds.tokens or pages > bounds.pages):
            yield tuple(current)
            current, tokens, pages = [], len(sample.tokens), bounds.pages_of(sample)
        current.append(sample)
    if current:
        yield tuple(current)


def check_length(samples: Iterable[Sample], most: int) -> None:
    """That no sample has more than `most` tokens, the endpoint's model.maxModelLength. JobFailedError."""
    for sample in samples:
        if len(sample.tokens) > most:
            raise JobFailedError(
                FailedReason.INVALID_DATASET,
                f"line {sample.id}: has {len(sample.tokens)} tokens, more than the endpoint's model.maxModelLength "
                f"{most}; set dataset.maxSequenceLength to that, with onInvalid: Skip if need be",
            )


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
