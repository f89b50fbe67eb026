"""Tokens drawn without a sort against those that a sort finds, and against the definition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from choices import CPU, bound, choose, drawn, kept, rows_with_ties, turns
from hypothesis import given, settings

from coserve_engine.kernels.masks import keep_allowed
from coserve_engine.kernels.sampling import sorted_whole, widening
from coserve_engine.kernels.triton import sampling
from coserve_engine.layout.choices import Choice
from coserve_engine.layout.masks import TokenMasks, words
from coserve_engine.messages import SamplingParams

CUTS = [(5, 1.0), (0, 0.9), (40, 0.5), (1, 1.0), (0, 0.0), (299, 0.999), (20, 0.3), (3, 0.99), (0, 1.0), (0, 1 - 1e-12)]
"""top_k and top_p."""


def rows_of(cuts: Sequence[tuple[int, float]], count: int) -> list[Choice]:
    several = [SamplingParams(max_tokens=1, temperature=1.0, top_k=k, top_p=p) for k, p in cuts]
    return [Choice(several[n % len(several)], n) for n in range(count)]


def p_of(seed: int, rows: int, vocab: int, spread: float) -> torch.Tensor:
    return (spread * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))).softmax(-1)


def u_of(seed: int, rows: int) -> torch.Tensor:
    return torch.rand(rows, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("vocab", "spread"), [(300, 3.0), (1040, 0.01), (700, 10.0), (9000, 2.0)])
def test_a_sort_would_choose_the_same(raced: Any, vocab: int, spread: float) -> None:
    p, u, choices = p_of(0, 12, vocab, spread), u_of(1, 12), bound(rows_of(CUTS, 12), vocab)
    if vocab == 300:
        (found,) = raced(lambda: (sampling.draw(p, choices, u),))
    else:
        found = sampling.draw(p, choices, u)
    assert torch.equal(found, sorted_whole(p, choices, u))


@pytest.mark.parametrize("spread", [0.5, 2.0, 6.0])
def test_many_rows_choose_as_on_a_cpu(spread: float) -> None:
    p, u, choices = p_of(2, 80, 1200, spread), u_of(3, 80), bound(rows_of(CUTS, 80), 1200)
    assert torch.equal(sampling.draw(p, choices, u), widening(p, choices, u))


@settings(max_examples=12, deadline=None)
@given(case=rows_with_ties())
def test_each_token_that_is_kept_comes_at_its_turn(case: tuple[torch.Tensor, SamplingParams]) -> None:
    """The set is that of a sort in float64, ties by token id, and its sum is inverted in the order of ids."""
    p, params = case
    expected, u = turns(p.tolist(), kept(p.tolist(), params.top_k, params.top_p))
    some = slice(None, None, max(1, len(u) // 11))
    assert drawn(sampling.draw, p, params, u[some]) == expected[some]


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (7, 1.0), (0, 0.5)])
def test_the_ends_of_a_sum_are_tokens_that_are_kept(top_k: int, top_p: float) -> None:
    p, params = torch.full((1100,), 1 / 2048), SamplingParams(1, 1.0, top_p, top_k=top_k)
    p[[0, 511, 1099]] = 0.0
    expected, _ = turns(p.tolist(), kept(p.tolist(), top_k, top_p))
    assert drawn(sampling.draw, p, params, [0.0, 1 - 2.0**-53]) == [expected[0], expected[-1]]


def test_the_choice_of_a_batch_is_the_same_and_of_a_row_alone() -> None:
    logits = torch.randn(9, 1400, generator=torch.Generator().manual_seed(3)) * 4
    params = [SamplingParams(max_tokens=1, temperature=0.0), SamplingParams(max_tokens=1, temperature=1.0, seed=4)]
    cuts = ((5, 1.0, 0.0), (0, 0.9, 0.0), (40, 0.5, 0.01), (0, 0.95, 0.2), (9, 0.9, 0.0), (0, 1.0, 0.1), (0, 1.0, 0.0))
    for k, p, least in cuts:
        params.append(SamplingParams(max_tokens=1, temperature=0.7, top_k=k, top_p=p, min_p=least, seed=k))
    rows = [Choice(one, n) for n, one in enumerate(params)]
    found = choose(logits, rows, sampling.draw)
    assert found == choose(logits, rows, widening)
    assert found == [choose(logits[n : n + 1], [rows[n]], sampling.draw)[0] for n in range(9)]


def test_rows_that_are_not_finite_disturb_nobody() -> None:
    logits, rows = torch.randn(8, 700, generator=torch.Generator().manual_seed(0)), rows_of(CUTS, 8)
    expected = choose(logits, rows, sampling.draw)
    for row, value in zip((0, 2, 4, 6), (math.nan, math.inf, -math.inf, math.nan), strict=True):
        logits[row, slice(None) if value == -math.inf else 3] = value
    found = choose(logits, rows, sampling.draw)
    assert found[1::2] == expected[1::2]
    assert all(0 <= token < 700 for token in found)


@pytest.mark.parametrize("wrong", ["u", "top_k", "top_p"])
def test_a_wrong_number_would_be_seen(wrong: str) -> None:
    """The control."""
    p, choices = p_of(5, 8, 300, 0.5), bound(rows_of([(50, 0.6)], 8), 300)
    u = torch.linspace(0.2, 0.95, 8, dtype=torch.float64).unsqueeze(1)
    expected = sorted_whole(p, choices, u)
    if wrong == "u":
        u = u + 0.04
    else:
        choices.column(wrong).mul_(0.8)
    assert not torch.equal(sampling.draw(p, choices, u), expected)


def test_ties_that_fall_otherwise_would_be_seen() -> None:
    """The control: the last of equal values."""
    p, params = torch.full((40,), 1 / 64), SamplingParams(1, 1.0, top_k=7)
    expected, u = turns(p.tolist(), range(33, 40))
    assert drawn(sampling.draw, p, params, u) == [*range(7)] != expected


def test_a_neighbours_sums_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: as if a row read what the first launch keeps of another."""
    p, u, choices = p_of(7, 12, 1200, 3.0), u_of(8, 12), bound(rows_of(CUTS, 12), 1200)
    expected, launch = sorted_whole(p, choices, u), sampling.DRAW.launch

    class Rolled:
        def launch(self, grid: Any, constants: Any, p: Any, most: Any, sums: Any, *others: Any) -> None:
            launch(grid, constants, p, most.roll(1, 0), sums.roll(1, 0), *others)

    monkeypatch.setattr(sampling, "DRAW", Rolled())
    assert not torch.equal(sampling.draw(p, choices, u), expected)


@pytest.mark.parametrize("spread", [0.01, 4.0])
def test_rows_of_which_a_grammar_allows_few_tokens_choose_those(spread: float) -> None:
    """Of the rest nothing is drawn, whether a row is cut or whole; other rows choose as they would."""
    logits = spread * torch.randn(12, 1400, generator=torch.Generator().manual_seed(4))
    tokens = [{7}, {0, 1399}, {31, 32, 63, 64, 1023}, set(range(0, 1400, 9))]
    flags = np.zeros((4, 32 * words(1400)), np.uint8)
    for flag, some in zip(flags, tokens, strict=True):
        flag[sorted(some)] = 1
    bits = np.packbits(flags, axis=1, bitorder="little").view(np.int32)
    rows = rows_of(CUTS[:6], 12)
    masked = logits.clone()
    keep_allowed(masked, TokenMasks([1, 4, 6, 11], bits), CPU)
    found = choose(masked, rows, sampling.draw)
    assert found == choose(masked, rows, widening)
    for row, some in zip((1, 4, 6, 11), tokens, strict=True):
        assert found[row] in some
    free = choose(logits, rows, sampling.draw)
    others = [row for row in range(12) if row not in (1, 4, 6, 11)]
    assert [found[row] for row in others] == [free[row] for row in others]
    assert any(free[row] not in some for row, some in zip((1, 4, 6, 11), tokens, strict=True)), "the control"
