"""Logits behind a mask: nothing else can be chosen, whatever chooses, and other rows keep their bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from choices import CPU, Requests, choose
from hypothesis import given
from hypothesis import strategies as st

from coserve_engine.kernels.masks import keep_allowed
from coserve_engine.kernels.sampling import Draw, sorted_whole, widening
from coserve_engine.layout.choices import Choice
from coserve_engine.layout.masks import TokenMasks, words
from coserve_engine.messages import SamplingParams

VOCAB = 333


def masks(allowed: dict[int, set[int]], vocab: int = VOCAB) -> TokenMasks:
    flags = np.zeros((len(allowed), 32 * words(vocab)), np.uint8)
    for flag, tokens in zip(flags, allowed.values(), strict=True):
        flag[sorted(tokens)] = 1
    return TokenMasks(list(allowed), np.packbits(flags, axis=1, bitorder="little").view(np.int32))


def allowed_only(logits: torch.Tensor, some: TokenMasks) -> torch.Tensor:
    """A copy that was masked."""
    masked = logits.clone()
    keep_allowed(masked, some, CPU)
    return masked


def logits_of(seed: int, rows: int, vocab: int = VOCAB) -> torch.Tensor:
    return 4 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


@given(
    allowed=st.dictionaries(st.integers(0, 5), st.sets(st.integers(0, VOCAB - 1), min_size=1), min_size=1, max_size=6)
)
def test_what_is_not_allowed_is_minus_infinity_and_nothing_else_changes(allowed: dict[int, set[int]]) -> None:
    logits = logits_of(0, 6)
    before, found = logits.clone(), allowed_only(logits, masks(allowed))
    for row in range(6):
        expected = before[row].clone()
        if row in allowed:
            expected[[token for token in range(VOCAB) if token not in allowed[row]]] = -torch.inf
        assert torch.equal(found[row], expected)


PARAMS = (
    SamplingParams(1),
    SamplingParams(1, 1.0),
    SamplingParams(1, 5.0, top_k=3),
    SamplingParams(1, 0.7, top_p=0.3, min_p=0.2),
    SamplingParams(1, 2.0, repetition_penalty=3.0, presence_penalty=2.0, frequency_penalty=-2.0),
    SamplingParams(1, 1.0, logit_bias=((7, 100.0), (8, -100.0))),
)


@pytest.mark.parametrize("draw", [widening, sorted_whole])
@pytest.mark.parametrize("params", PARAMS)
@given(tokens=st.sets(st.integers(0, VOCAB - 1), min_size=1, max_size=4), seed=st.integers(0, 1 << 30))
def test_only_what_is_allowed_is_chosen(draw: Draw, params: SamplingParams, tokens: set[int], seed: int) -> None:
    """No bias or penalty lifts it, and however few there are."""
    requests, logits = (
        Requests(VOCAB, (1, 2), (3, 7)),
        allowed_only(logits_of(seed, 5), masks({1: tokens, 3: tokens})),
    )
    found = requests.choose(logits, [requests.choice(params, n) for n in range(5)], draw)
    assert {found[1], found[3]} <= tokens


def test_a_row_is_drawn_from_what_is_left_as_if_there_was_no_more() -> None:
    """The shares among those that are allowed stay as they were."""
    logits, tokens = logits_of(1, 1), [5, 100, 332]
    rest = logits[:, tokens].softmax(-1).squeeze(0)
    params, count = SamplingParams(1, 1.0, seed=3), 4000
    masked = allowed_only(logits, masks({0: set(tokens)})).expand(count, -1)
    found = choose(masked, [Choice(params, n) for n in range(count)])
    for token, share in zip(tokens, rest.tolist(), strict=True):
        assert found.count(token) / count == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_allowed_keeps_its_bits(dtype: torch.dtype) -> None:
    """Zeros of either sign and infinities included; what is no number stays none."""
    odd = torch.tensor([[-0.0, 0.0, torch.inf, -torch.inf, 3e-5, 1e-40, 7.0, -7.0] * 4], dtype=dtype)
    found = allowed_only(odd, masks({0: set(range(32))}, 32))
    whole = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16}[dtype]
    assert torch.equal(found.view(whole), odd.view(whole))
    assert allowed_only(torch.full((1, 32), torch.nan, dtype=dtype), masks({0: {1}}, 32)).isnan().all()
