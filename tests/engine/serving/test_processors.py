"""Every parameter does to a row's logits what transformers' processors do, and nothing to its neighbours."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from choices import Requests, choose
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation import logits_process as reference

from coserve_engine.kernels import sampling
from coserve_engine.kernels.sampling import CANDIDATES, Draw, sorted_whole, widening
from coserve_engine.layout.choices import Choice
from coserve_engine.messages import AddRequest, FinishReason, SamplingParams, TokenBatch

VOCAB = 400
PROMPT = (1, 2, 3, 2)
OUTPUT = (2, 5, 5, 5, 7)


def random_logits(seed: int, rows: int = 1, vocab: int = VOCAB) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def processed(
    params: SamplingParams, logits: torch.Tensor, enders: tuple[int, ...] = (), output: tuple[int, ...] = OUTPUT
) -> torch.Tensor:
    """Logits of requests that have said `output`."""
    requests = Requests(VOCAB, PROMPT, output, enders)
    return requests.processed(logits, [requests.choice(params) for _ in range(logits.shape[0])])


# ---- penalties, bias, min_tokens ----


@given(penalty=st.floats(0.1, 5).filter(lambda p: p != 1), seed=st.integers(0, 100))
def test_repetition_penalty_is_transformers(penalty: float, seed: int) -> None:
    logits = random_logits(seed)
    expected = reference.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([[*PROMPT, *OUTPUT]]), logits.clone())
    found = processed(SamplingParams(10, repetition_penalty=penalty), logits)
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found, logits)


@given(presence=st.floats(-2, 2), frequency=st.floats(0.1, 2))
def test_presence_and_frequency_count_the_output(presence: float, frequency: float) -> None:
    """OpenAI's formula: logit - count * frequency - (count > 0) * presence; the prompt does not count."""
    logits, expected = random_logits(1), random_logits(1)
    for token, count in Counter(OUTPUT).items():
        expected[0, token] -= count * frequency + presence
    torch.testing.assert_close(
        processed(SamplingParams(10, presence_penalty=presence, frequency_penalty=frequency), logits), expected
    )


def test_bias_is_transformers() -> None:
    logits, bias = random_logits(2), {3: 1.5, 9: -100.0, 1: 0.25}
    sequence_bias = reference.SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()})
    expected = sequence_bias(torch.tensor([[*PROMPT, *OUTPUT]]), logits.clone())
    torch.testing.assert_close(processed(SamplingParams(10, logit_bias=tuple(bias.items())), logits), expected)


@pytest.mark.parametrize("length", range(8))
def test_min_tokens_is_transformers(length: int) -> None:
    logits, output = random_logits(3), OUTPUT[:length] + (8,) * max(0, length - len(OUTPUT))
    minimum = reference.MinNewTokensLengthLogitsProcessor(len(PROMPT), 4, [6, 11], device="cpu")
    expected = minimum(torch.tensor([[*PROMPT, *output]]), logits.clone())
    found = processed(SamplingParams(10, min_tokens=4), logits, (6, 11), output)
    assert torch.equal(found, expected)
    assert bool(torch.isinf(found).any()) is (length < 4)


def test_the_order_is_penalties_bias_mask() -> None:
    """A bias is not penalised, and no bias lifts a ban."""
    logits = random_logits(4)
    params = SamplingParams(10, repetition_penalty=2.0, logit_bias=((5, 7.0), (6, 100.0)), min_tokens=9)
    found = processed(params, logits, enders=(6,))
    penalised = processed(SamplingParams(10, repetition_penalty=2.0), logits)
    torch.testing.assert_close(found[0, 5], penalised[0, 5] + 7.0)
    assert found[0, 6] == float("-inf")


def test_logits_are_not_changed_in_place() -> None:
    logits = random_logits(5)
    processed(SamplingParams(10, repetition_penalty=2.0, logit_bias=((1, 1.0),), min_tokens=9), logits, enders=(6,))
    assert torch.equal(logits, random_logits(5))


# ---- top_k, top_p, min_p ----

CUTS = [
    SamplingParams(1, 1.0, top_k=5),
    SamplingParams(1, 0.7, 0.6),
    SamplingParams(1, 1.3, min_p=0.1),
    SamplingParams(1, 0.8, 0.9, top_k=40, min_p=0.02),
    SamplingParams(1, 1.0, 0.95, top_k=CANDIDATES + 20),
    SamplingParams(1, 50.0, 0.9),  # so flat that the candidates do not hold the nucleus
    SamplingParams(1, 50.0, 0.999, min_p=0.8),
    SamplingParams(1, 1.0, top_k=VOCAB + 5),
]


def distribution(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """By transformers' warpers in vLLM's order: temperature, min_p, top_k, top_p."""
    ids = torch.zeros(1, 1, dtype=torch.int64)
    scores = reference.TemperatureLogitsWarper(params.temperature)(ids, logits.clone())
    if params.min_p > 0:
        scores = reference.MinPLogitsWarper(params.min_p)(ids, scores)
    if params.top_k > 0:
        scores = reference.TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1:
        scores = reference.TopPLogitsWarper(params.top_p)(ids, scores)
    return torch.softmax(scores, -1)[0].double()


def farthest(
    params: SamplingParams, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch, draw: Draw = widening
) -> float:
    """How far the share of a fine grid of numbers that leads to a token is from its probability, in grid steps."""
    grid = 20_000
    monkeypatch.setattr(sampling, "uniforms", lambda seeds, positions: (positions + 0.5) / grid)
    choices = [Choice(params, position) for position in range(grid)]
    found = choose(random_logits(7).expand(grid, -1), choices, draw)
    share = torch.bincount(torch.tensor(found), minlength=VOCAB).double() / grid
    assert not bool(share[expected == 0].any())
    return float((share - expected).abs().max()) * grid


@pytest.mark.parametrize("draw", (widening, sorted_whole))
@pytest.mark.parametrize("params", CUTS, ids=str)
def test_what_is_left_to_draw_from_is_transformers(
    params: SamplingParams, draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert farthest(params, distribution(random_logits(7), params), monkeypatch, draw) <= 2


@pytest.mark.parametrize("change", ({"top_k": 41}, {"top_p": 0.88}, {"min_p": 0.03}, {"temperature": 0.82}), ids=str)
def test_a_slightly_other_cut_is_noticed(change: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    field = next(iter(change))
    right = SamplingParams(
        1, 0.8, **{"top_k": {"top_k": 40}, "top_p": {"top_p": 0.9}, "min_p": {"min_p": 0.02}}.get(field, {})
    )
    expected = distribution(random_logits(7), right) + 1e-300
    assert farthest(replace(right, **change), expected, monkeypatch) > 10


# ---- rows ----


@st.composite
def parameters(draw: st.DrawFn) -> SamplingParams:
    return SamplingParams(
        20,
        temperature=draw(st.sampled_from((0.0, 1e-9, 0.3, 1.0, 2.0, 30.0))),
        top_p=draw(st.sampled_from((0.0, 0.3, 0.9, 1.0))),
        seed=draw(st.integers(0, 1000)),
        top_k=draw(st.sampled_from((0, 1, 7, CANDIDATES, 300, 1000))),
        min_p=draw(st.sampled_from((0.0, 0.0, 0.05, 0.5))),
        repetition_penalty=draw(st.sampled_from((1.0, 1.0, 1.5))),
        frequency_penalty=draw(st.sampled_from((0.0, 0.0, 0.5))),
        logit_bias=draw(st.sampled_from(((), ((3, 2.0),)))),
        min_tokens=draw(st.sampled_from((0, 0, 10))),
    )


def said(several: list[SamplingParams], rows: list[int], logits: torch.Tensor, draw: Draw) -> list[int]:
    """What these rows choose together."""
    requests = Requests(VOCAB, PROMPT, OUTPUT, (6,))
    return requests.choose(logits[rows], [requests.choice(several[n], n) for n in rows], draw)


@given(st.lists(parameters(), min_size=1, max_size=9), st.integers(0, 1000))
def test_a_row_does_not_see_its_neighbours(several: list[SamplingParams], seed: int) -> None:
    logits, rows = random_logits(seed, len(several)), list(range(len(several)))
    together = said(several, rows, logits, widening)
    assert together == [said(several, [n], logits, widening)[0] for n in rows]
    assert all(0 <= token < VOCAB for token in together)


@given(st.lists(parameters(), min_size=1, max_size=9), st.integers(0, 1000))
def test_sorting_all_finds_what_widening_does(several: list[SamplingParams], seed: int) -> None:
    logits, rows = random_logits(seed, len(several)), list(range(len(several)))
    assert said(several, rows, logits, sorted_whole) == said(several, rows, logits, widening)


@pytest.mark.parametrize("draw", (widening, sorted_whole))
@pytest.mark.parametrize("top_p", (0.9999999, 1 - 1e-12))
def test_a_nucleus_that_rounding_never_fills_is_all_tokens(top_p: float, draw: Draw) -> None:
    """The sum of a large vocabulary's probabilities may stay below top_p."""
    choices = [Choice(SamplingParams(1, 1.0, top_p, seed=n), n) for n in range(64)]
    found = choose(random_logits(3, 64, 50_000), choices, draw)
    assert all(0 <= token < 50_000 for token in found)
    assert len(set(found)) > 50


def test_what_is_chosen_is_counted() -> None:
    """By the table itself, where a row has penalties: a repetition costs what it should without a word of the host."""
    logits = torch.zeros(2, VOCAB)
    logits[:, 9], logits[:, 11] = 3.0, 2.9
    requests = Requests(VOCAB, PROMPT)
    choices = [requests.choice(SamplingParams(9, frequency_penalty=1.0)), Choice(SamplingParams(9), 0)]
    found, (penalised, plain) = [], choices
    assert penalised.seen is not None
    for n in range(4):
        later = penalised._replace(seen=penalised.seen._replace(length=penalised.seen.length + n))
        found.append(requests.choose(logits, [later, plain]))
    assert found == [[9, 9], [11, 9], [9, 9], [11, 9]]


def test_randomness_that_is_drawn_breaks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a generator gives a row what its neighbours left over."""
    several = [SamplingParams(20, 1.0, seed=n) for n in range(8)]
    logits = random_logits(1, 8)
    generator = random.Random(0)
    monkeypatch.setattr(
        sampling, "uniforms", lambda seeds, _: torch.tensor([generator.random() for _ in seeds], dtype=torch.float64)
    )
    together = said(several, list(range(8)), logits, widening)
    assert together != [said(several, [n], logits, widening)[0] for n in range(8)]


# ---- in the engine ----


def run(driver: Any, params: SamplingParams, prompt: tuple[int, ...]) -> list[int]:
    d = driver()
    d.submit(AddRequest("r", prompt, params, 0.0))
    return list(d.run().tokens()["r"])


def test_penalties_keep_a_greedy_output_from_repeating(driver: Any, draw_tokens: Any) -> None:
    plain = SamplingParams(40, ignore_eos=True)
    prompt = draw_tokens(1, 20)
    repeated = len(run(driver, plain, prompt)) - len(set(run(driver, plain, prompt)))
    assert repeated > 0
    for change in ({"frequency_penalty": 1e4}, {"presence_penalty": 1e4}, {"repetition_penalty": 1e6}):
        output = run(driver, replace(plain, **change), prompt)
        assert len(set(output)) == 40, change
    assert not set(run(driver, replace(plain, repetition_penalty=1e6), prompt)) & set(prompt)


def test_a_bias_decides(driver: Any, draw_tokens: Any) -> None:
    params = SamplingParams(5, logit_bias=((77, 1000.0),), ignore_eos=True)
    assert run(driver, params, draw_tokens(1, 20)) == [77] * 5


@pytest.mark.parametrize("minimum", (0, 1, 3, 6))
def test_nothing_ends_before_min_tokens(driver: Any, draw_tokens: Any, minimum: int) -> None:
    """Token 2 is the model's end, 77 a stop token; a bias makes them the likeliest by far."""
    prompt = draw_tokens(1, 20)
    for ender, stops in ((2, ()), (77, (77,))):
        d = driver()
        params = SamplingParams(6, logit_bias=((ender, 1000.0),), stop_token_ids=stops, min_tokens=minimum)
        d.submit(AddRequest("r", prompt, params, 0.0))
        output = d.run().tokens()["r"]
        assert ender not in output[:minimum]
        assert len(output) == min(minimum + 1, 6)
        last = [token for batch in d.of(TokenBatch) for token in batch.tokens][-1]
        assert last.finish is (FinishReason.STOP if minimum < 6 else FinishReason.LENGTH)


BAD = [
    ({"temperature": -1.0}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"min_p": -0.1}, "min_p"),
    ({"top_k": -1}, "top_k"),
    ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ({"presence_penalty": float("inf")}, "presence_penalty"),
    ({"frequency_penalty": float("nan")}, "frequency_penalty"),
    ({"min_tokens": 5}, "min_tokens"),
    ({"logprobs": 21}, "logprobs"),
    ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ({"logit_bias": ((128, 1.0),)}, "logit_bias"),
    ({"logit_bias": ((5, float("inf")),)}, "logit_bias"),
    ({"stop_token_ids": (-1,)}, "stop_token_ids"),
]


@pytest.mark.parametrize(("change", "field"), BAD, ids=str)
def test_a_wrong_parameter_is_named(driver: Any, change: dict[str, Any], field: str) -> None:
    d = driver()
    d.submit(AddRequest("bad", (5, 6), SamplingParams(4, **change), 0.0))
    d.submit(AddRequest("good", (5, 6), SamplingParams(4, ignore_eos=True), 0.0))
    d.run()
    (failed,) = d.failures
    assert (failed.request_id, failed.code) == ("bad", "invalid_parameter")
    assert failed.message.startswith(field)
    assert len(d.tokens()["good"]) == 4


def test_thirty_two_rows_are_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole vocabulary is looked at a fixed number of times, however many rows there are."""
    calls: list[int] = []
    softmax = torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda *a, **k: (calls.append(1), softmax(*a, **k))[1])
    source = random.Random(0)
    params = [replace(source.choice(CUTS), seed=n) for n in range(32)]
    choose(random_logits(1, 32), [Choice(one, n) for n, one in enumerate(params)])
    assert len(calls) == 1
