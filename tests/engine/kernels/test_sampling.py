"""Tokens follow the distribution that temperature and top_p define, and (seed, position) alone names the randomness."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from choices import choose, drawn, kept, rows_with_ties, turns
from hypothesis import given
from hypothesis import strategies as st

from coserve_engine.kernels.sampling import Draw, sorted_whole, uniforms, widening
from coserve_engine.layout.choices import Choice, ChoiceLayout
from coserve_engine.messages import AddRequest, SamplingParams

DRAWS = 20_000
MASK = (1 << 64) - 1


def sample_u(seed: int, position: int) -> float:
    """The definition: two rounds of SplitMix64 in Python's integers."""

    def mix(z: int) -> int:
        z = (z + 0x9E3779B97F4A7C15) & MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    return (mix(mix(seed & MASK) ^ position) >> 11) * 2.0**-53


def chi_square_limit(freedom: int) -> float:
    """Exceeded once in a thousand (Wilson and Hilferty's approximation)."""
    part = 2 / (9 * freedom)
    return freedom * (1 - part + 3.09 * math.sqrt(part)) ** 3


def chi_square(counts: Sequence[int], probabilities: Sequence[float]) -> float:
    total = sum(counts)
    return sum((c - total * p) ** 2 / (total * p) for c, p in zip(counts, probabilities, strict=True))


def uniform(numbers: list[float]) -> bool:
    bins = Counter(int(u * 20) for u in numbers)
    assert set(bins) <= set(range(20))
    return chi_square([bins[b] for b in range(20)], [1 / 20] * 20) < chi_square_limit(19)


@pytest.mark.parametrize("seed", (0, 1, 1 << 63))
def test_uniform_over_positions(seed: int) -> None:
    assert uniform([sample_u(seed, position) for position in range(DRAWS)])


@pytest.mark.parametrize("position", (0, 1, 1000))
def test_uniform_over_seeds(position: int) -> None:
    assert uniform([sample_u(seed, position) for seed in range(DRAWS)])


def test_neighbours_are_independent() -> None:
    """Pairs (u(s, p), u(s, p + 1)) and (u(s, p), u(s + 1, p)) fill a 10 by 10 grid evenly."""
    for step in ((0, 1), (1, 0)):
        cells: Counter[tuple[int, int]] = Counter()
        for n in range(DRAWS):
            seed, position = n % 141, n // 141
            u, v = sample_u(seed, position), sample_u(seed + step[0], position + step[1])
            cells[int(u * 10), int(v * 10)] += 1
        counts = [cells[i, j] for i in range(10) for j in range(10)]
        assert chi_square(counts, [0.01] * 100) < chi_square_limit(99)


@given(seed=st.integers(-(1 << 70), 1 << 70), position=st.integers(0, 1 << 40))
def test_tensors_compute_the_same_number(seed: int, position: int) -> None:
    (signed,) = ChoiceLayout.of([Choice(SamplingParams(1, 1.0, seed=seed), position)], 8, 4).seed[:1]
    found = float(uniforms(torch.tensor([signed]), torch.tensor([position])))
    assert found == sample_u(seed, position)
    assert 0.0 <= found < 1.0


LOGITS = torch.tensor([2.0, -1.0, 1.5, 0.0, 1.9, -3.0, 0.7, 1.0])


def expected(temperature: float, top_p: float) -> list[float]:
    """The smallest set of the likeliest tokens whose mass reaches top_p, made to sum to one."""
    p = torch.softmax(LOGITS.double() / temperature, -1).tolist()
    kept, mass = [0.0] * len(p), 0.0
    for token in sorted(range(len(p)), key=lambda t: -p[t]):
        if mass >= top_p:
            break
        kept[token], mass = p[token], mass + p[token]
    return [value / mass for value in kept]


def draws(logits: torch.Tensor, params: SamplingParams, positions: Sequence[int]) -> list[int]:
    """A token for each position, from the same logits [vocab]."""
    rows = logits.expand(len(positions), -1)
    return choose(rows, [Choice(params, position) for position in positions])


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.7, 1.0), (1.0, 0.8), (0.7, 0.5)])
def test_distribution(temperature: float, top_p: float) -> None:
    params = SamplingParams(1, temperature=temperature, top_p=top_p, seed=5)
    counts = Counter(draws(LOGITS, params, range(DRAWS)))
    p = expected(temperature, top_p)
    allowed = [token for token, value in enumerate(p) if value > 0]
    assert set(counts) <= set(allowed)
    assert chi_square([counts[t] for t in allowed], [p[t] for t in allowed]) < chi_square_limit(len(allowed) - 1)


def test_another_temperature_is_noticed() -> None:
    params = SamplingParams(1, temperature=1.0, seed=5)
    counts = Counter(draws(LOGITS, params, range(DRAWS)))
    p = expected(1.1, 1.0)
    assert chi_square([counts[t] for t in range(8)], p) > chi_square_limit(7)


def test_temperature_zero_takes_the_likeliest() -> None:
    choices = [Choice(SamplingParams(1, seed=s), s) for s in range(50)]
    assert set(choose(LOGITS.expand(50, -1), choices)) == {0}


@pytest.mark.parametrize("top_p", (0.0, 1e-9))
def test_a_tiny_nucleus_keeps_the_likeliest(top_p: float) -> None:
    assert set(draws(LOGITS, SamplingParams(1, 1.0, top_p, seed=1), range(50))) == {0}


def test_impossible_tokens_never_come() -> None:
    logits = torch.full((64,), float("-inf"))
    logits[[7, 40]] = 0.0
    for params in (SamplingParams(1, 1.0, seed=3), SamplingParams(1, 1.0, 0.99, seed=3)):
        assert set(draws(logits, params, range(200))) == {7, 40}


@pytest.mark.parametrize("draw", (widening, sorted_whole))
@given(case=rows_with_ties())
def test_each_token_that_is_kept_comes_at_its_turn(draw: Draw, case: tuple[torch.Tensor, SamplingParams]) -> None:
    """The set is that of a sort in float64, ties by token id, and its sum is inverted in the order of ids."""
    p, params = case
    expected, u = turns(p.tolist(), kept(p.tolist(), params.top_k, params.top_p))
    assert drawn(draw, p, params, u) == expected


def test_ties_that_fall_otherwise_are_noticed() -> None:
    """The control: of equal values the last are kept."""
    p, params = torch.full((40,), 1 / 64), SamplingParams(1, 1.0, top_k=7)
    expected, u = turns(p.tolist(), [39 - token for token in reversed(kept(p.tolist(), 7, 1.0))])
    assert drawn(widening, p, params, u) == [token - 33 for token in expected] != expected


@pytest.mark.parametrize("draw", (widening, sorted_whole))
def test_rows_that_are_not_finite_disturb_nobody(draw: Draw) -> None:
    logits = torch.randn(8, 700, generator=torch.Generator().manual_seed(0))
    cuts = ({}, {"top_k": 5}, {"top_p": 0.5}, {"top_k": 90, "top_p": 0.9})
    choices = [Choice(SamplingParams(1, 1.0, seed=n, **cuts[n // 2]), n) for n in range(8)]
    expected = choose(logits, choices, draw)
    for row, value in zip((0, 2, 4, 6), (math.nan, math.inf, -math.inf, math.nan), strict=True):
        logits[row, slice(None) if value == -math.inf else 3] = value
    found = choose(logits, choices, draw)
    assert found[1::2] == expected[1::2]
    assert all(0 <= token < 700 for token in found)


def test_a_seed_names_the_whole_output(driver: Any, draw_tokens: Any) -> None:
    d, prompt = driver(), draw_tokens(1, 20)
    seeds = {"a": 1, "b": 1, "c": 2}
    for name, seed in seeds.items():
        params = SamplingParams(24, temperature=1.5, seed=seed, ignore_eos=True)
        d.submit(AddRequest(name, prompt, params, 0.0))
        d.step()
    tokens = d.run().tokens()
    assert tokens["a"] == tokens["b"] != tokens["c"]
