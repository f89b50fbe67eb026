"""Passes and weights depend on the data alone, and lose nothing."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from coserve_agent.passes import split_passes, to_seqs, weight_sum
from coserve_api.shards import Sample


def sample(number: int, length: int) -> Sample:
    return Sample(number, (5,) * length, (0.0,) + (1.0,) * (length - 1))


@given(st.lists(st.integers(2, 700), min_size=1, max_size=20), st.integers(1, 600))
def test_whole_samples_in_order_as_many_as_fit(lengths: list[int], limit: int) -> None:
    samples = [sample(n, length) for n, length in enumerate(lengths)]
    passes = split_passes(samples, limit)
    assert [one for part in passes for one in part] == samples
    for part in passes:
        assert len(part) == 1 or sum(len(one.tokens) for one in part) <= limit
    for part, following in pairwise(passes):
        assert sum(len(one.tokens) for one in (*part, following[0])) > limit


def test_weights_of_a_step_sum_to_one() -> None:
    samples = [sample(1, 5), Sample(2, (1, 2, 3), (9.0, 0.5, 0.5))]
    total = weight_sum(samples)
    assert total == 5.0
    seqs = [seq for part in split_passes(samples, 6) for seq in to_seqs(part, total)]
    assert sum(sum(seq.weights[1:]) for seq in seqs) == 1.0
    assert [seq.uid for seq in seqs] == [1, 2]


def test_the_turns_of_a_line_are_told_apart() -> None:
    seqs = to_seqs([Sample(7, (1, 2), (0.0, 1.0), turn) for turn in (0, 1, 2)], 1.0)
    assert [(seq.uid, seq.turn) for seq in seqs] == [(7, 0), (7, 1), (7, 2)]
