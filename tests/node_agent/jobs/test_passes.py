"""Passes and weights depend on the data and the pool's size alone, and lose nothing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from coserve_agent.engine.pass_bounds import PassBounds
from coserve_agent.jobs.passes import split_passes, to_seqs, weight_sum
from coserve_contract.shards import Sample
from coserve_engine.layout.passes import pages_of_pass
from coserve_engine.numerics import Numerics


def sample(number: int, length: int) -> Sample:
    return Sample(number, (5,) * length, (0.0,) + (1.0,) * (length - 1))


def fits(part: Sequence[Sample], bounds: PassBounds) -> bool:
    """By the engine's own count of pages."""
    lengths = tuple(len(one.tokens) for one in part)
    pages = pages_of_pass(lengths, Numerics(page=bounds.page_tokens, tile=bounds.page_tokens))
    return sum(lengths) <= bounds.tokens and pages <= bounds.pages


@given(
    st.lists(st.integers(2, 700), min_size=1, max_size=20),
    st.builds(PassBounds, st.integers(1, 40), st.sampled_from([16, 64]), st.integers(1, 600)),
)
def test_whole_samples_in_order_as_many_as_fit(lengths: list[int], bounds: PassBounds) -> None:
    samples = [sample(n, length) for n, length in enumerate(lengths)]
    passes = split_passes(samples, bounds)
    assert [one for part in passes for one in part] == samples
    for part in passes:
        assert len(part) == 1 or fits(part, bounds)
    for part, following in pairwise(passes):
        assert not fits((*part, following[0]), bounds)


@given(st.lists(st.integers(2, 700), min_size=1, max_size=20))
def test_a_pool_that_holds_the_passes_changes_none(lengths: list[int]) -> None:
    """So jobs of such an endpoint keep their bits whatever engine.kvCacheMemory is."""
    samples = [sample(n, length) for n, length in enumerate(lengths)]
    large = split_passes(samples, PassBounds(1 << 20, 64, 512))
    most = max(sum(-(-len(one.tokens) // 64) for one in part) for part in large)
    assert split_passes(samples, PassBounds(most, 64, 512)) == large


def test_weights_of_a_step_sum_to_one() -> None:
    samples = [sample(1, 5), Sample(2, (1, 2, 3), (9.0, 0.5, 0.5))]
    total = weight_sum(samples)
    assert total == 5.0
    seqs = [seq for part in split_passes(samples, PassBounds(8, 64, 6)) for seq in to_seqs(part, total)]
    assert sum(sum(seq.weights[1:]) for seq in seqs) == 1.0
    assert [seq.uid for seq in seqs] == [1, 2]


def test_the_turns_of_a_line_are_told_apart() -> None:
    seqs = to_seqs([Sample(7, (1, 2), (0.0, 1.0), turn) for turn in (0, 1, 2)], 1.0)
    assert [(seq.uid, seq.turn) for seq in seqs] == [(7, 0), (7, 1), (7, 2)]
