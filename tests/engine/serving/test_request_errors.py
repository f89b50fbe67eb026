"""A request that cannot run is refused with a code and what to do; others do not notice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from coserve_engine.config import EngineConfig
from coserve_engine.messages import (
    AdapterVersion,
    AddRequest,
    Cancel,
    FinishReason,
    RequestFailed,
    SamplingParams,
    TokenBatch,
)

FINE = SamplingParams(4, ignore_eos=True)


@pytest.mark.parametrize(
    ("prompt", "params", "code", "named"),
    [
        ((), FINE, "invalid_token", "no tokens"),
        ((5, 128), FINE, "invalid_token", "vocabulary of 128"),
        ((5, -1), FINE, "invalid_token", "vocabulary of 128"),
        ((5,), SamplingParams(0), "invalid_token", "max_tokens is 0"),
        ((5,), SamplingParams(-3), "invalid_token", "max_tokens is -3"),
        ((5,) * 253, FINE, "context_length_exceeded", "This model's maximum context length is 256 tokens"),
        ((5,), SamplingParams(256), "context_length_exceeded", "256"),
        ((5,) * 1000, FINE, "context_length_exceeded", "shorten the prompt"),
    ],
)
def test_a_request_that_cannot_run(
    driver: Any, prompt: tuple[int, ...], params: SamplingParams, code: str, named: str
) -> None:
    d = driver()
    free = d.engine.executor.ledger.free_pages
    d.submit(AddRequest("bad", prompt, params, 0.0), AddRequest("good", (5, 6), FINE, 0.0))
    d.run()
    failed = d.one(RequestFailed)
    assert (failed.request_id, failed.code) == ("bad", code)
    assert named in failed.message
    assert {name: len(tokens) for name, tokens in d.tokens().items()} == {"good": 4}
    assert d.engine.executor.ledger.free_pages == free


@pytest.mark.parametrize("digits", (400, 5000), ids=("no-float", "not-written"))
@pytest.mark.parametrize("sign", (1, -1))
@pytest.mark.parametrize(
    "field",
    (
        *("min_tokens", "top_k", "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"),
        *("frequency_penalty", "logprobs", "prompt_logprobs", "max_tokens", "logit_bias", "stop_token_ids", "ttft_s"),
    ),
)
def test_a_number_that_no_float_holds(driver: Any, field: str, sign: int, digits: int) -> None:
    number: Any = sign * 10**digits
    value = {"logit_bias": ((5, number),), "stop_token_ids": (number,)}.get(field, number)
    request = AddRequest("bad", (5, 6), FINE, 0.0)
    params = replace(FINE, **{field: value}) if field != "ttft_s" else FINE
    d = driver()
    d.submit(replace(request, params=params, ttft_s=number if field == "ttft_s" else None))
    d.submit(replace(request, request_id="good"))
    failed = d.run().one(RequestFailed)
    assert failed.request_id == "bad"
    assert field in failed.message
    assert len(d.tokens()["good"]) == 4


HUGE = 1e30
"""What a logit can bear in float32."""


@pytest.mark.parametrize(
    ("field", "value"),
    (
        *(("temperature", 2 * HUGE), ("presence_penalty", -2 * HUGE), ("frequency_penalty", 2 * HUGE)),
        *(("repetition_penalty", 2 * HUGE), ("repetition_penalty", 0.5 / HUGE), ("logit_bias", ((5, 2 * HUGE),))),
    ),
)
def test_a_number_that_no_logit_bears(driver: Any, field: str, value: Any) -> None:
    d = driver()
    d.submit(AddRequest("bad", (5, 6), replace(FINE, **{field: value}), 0.0))
    failed = d.run().one(RequestFailed)
    assert (failed.code, failed.field) == ("invalid_parameter", field)
    assert "it must be a finite number from" in failed.message


@pytest.mark.parametrize("temperature", (0.0, 1.0))
def test_the_largest_bias_chooses_what_it_says(driver: Any, temperature: float) -> None:
    """One that overflowed would leave NaN for a distribution, from which the vocabulary's last token is drawn."""
    bias = ((5, HUGE), (9, HUGE), (6, -HUGE)) * 2
    params = replace(FINE, max_tokens=12, temperature=temperature, logit_bias=bias, frequency_penalty=HUGE / 1e6)
    d = driver()
    d.submit(AddRequest("r", (7, 6), params, 0.0))
    tokens = d.run().tokens()["r"]
    assert len(tokens) == 12
    assert set(tokens) <= {5, 9}


@pytest.mark.parametrize("first", ("running", "waiting"))
def test_the_id_of_a_request_that_is_not_done(driver: Any, first: str) -> None:
    """The first goes on as if nothing had come; its id is free when it is done or cancelled."""
    d = driver(max_requests=1)
    if first == "waiting":
        d.submit(AddRequest("before", (7, 8), FINE, 0.0))
    d.submit(AddRequest("a", (5, 6), FINE, 0.0))
    d.step()
    d.submit(AddRequest("a", (9, 10), FINE, 0.0))
    failed = d.run().one(RequestFailed)
    assert (failed.request_id, failed.code) == ("a", "duplicate_request")
    assert "request_id is 'a'" in failed.message
    assert d.tokens()["a"] == driver_alone(driver, (5, 6))
    d.submit(AddRequest("a", (9, 10), FINE, 0.0), Cancel("a"), AddRequest("a", (9, 10), FINE, 0.0))
    assert d.run().tokens()["a"][4:] == driver_alone(driver, (9, 10))
    assert len(d.failures) == 1


def driver_alone(driver: Any, prompt: tuple[int, ...]) -> list[int]:
    d = driver()
    d.submit(AddRequest("alone", prompt, FINE, 0.0))
    return list(d.run().tokens()["alone"])


def test_the_longest_request_runs(driver: Any) -> None:
    d = driver()
    d.submit(AddRequest("r", (5,) * 252, FINE, 0.0))
    assert len(d.run().tokens()["r"]) == 4


def test_an_unknown_adapter_is_never_the_base_model(driver: Any) -> None:
    d = driver()
    d.submit(AddRequest("r", (5, 6), FINE, 0.0, AdapterVersion("a", 2)))
    failed = d.run().one(RequestFailed)
    assert failed.code == "unknown_adapter"
    assert "uid='a', number=2" in failed.message
    assert d.tokens() == {}


@pytest.mark.parametrize("steps", (0, 1, 3))
def test_a_cancelled_request_is_silent(driver: Any, steps: int) -> None:
    d = driver(max_requests=1)
    d.submit(AddRequest("first", (5,) * 200, FINE, 0.0), AddRequest("second", (6,), FINE, 0.0))
    for _ in range(steps):
        d.step()
    seen = len(d.events)
    d.submit(Cancel("first"), Cancel("first"), Cancel("never"))
    d.run()
    later = [token for batch in d.events[seen:] if isinstance(batch, TokenBatch) for token in batch.tokens]
    assert {token.request_id for token in later} == {"second"}
    assert len(d.tokens()["second"]) == 4
    assert d.failures == []


def test_a_prompt_comes_to_its_turn_beside_a_full_forward(driver: Any, draw_tokens: Any) -> None:
    """As many requests would decode as a forward has rows."""
    d = driver(max_batch_tokens=32)
    for n in range(32):
        d.submit(AddRequest(f"r{n}", draw_tokens(n, 3), SamplingParams(40, ignore_eos=True), d.clock.now))
    d.submit(AddRequest("late", draw_tokens(99, 20), SamplingParams(1, ignore_eos=True), d.clock.now))
    most = 0
    while not d.engine.idle:
        d.step()
        most = max(most, len(d.engine.requests.running))
    assert most == d.engine.config.places == 16
    assert len(d.tokens()["late"]) == 1


@pytest.mark.parametrize(("rows", "places"), ((512, 64), (128, 64), (100, 50), (16, 8), (1, 1)))
def test_decode_leaves_room_for_prompts(rows: int, places: int) -> None:
    assert EngineConfig("", max_batch_tokens=rows).places == places


def test_a_waiting_request_can_be_cancelled(driver: Any) -> None:
    d = driver(max_requests=1)
    d.submit(AddRequest("first", (5,), FINE, 0.0), AddRequest("second", (6,), FINE, 0.0))
    d.step()
    d.submit(Cancel("second"))
    assert set(d.run().tokens()) == {"first"}


def finishes(d: Any) -> list[FinishReason | None]:
    return [token.finish for batch in d.of(TokenBatch) for token in batch.tokens]


def test_why_a_request_ended(driver: Any, draw_tokens: Any) -> None:
    """The same greedy output, cut by its length, by a stop token and by the model's end-of-text."""
    prompt = draw_tokens(3, 20)
    d = driver()
    d.submit(AddRequest("r", prompt, SamplingParams(6, ignore_eos=True), 0.0))
    whole = d.run().tokens()["r"]
    assert finishes(d) == [None] * 5 + [FinishReason.LENGTH]
    place = whole.index(whole[3])
    stopped = driver()
    stopped.submit(AddRequest("r", prompt, SamplingParams(6, ignore_eos=True, stop_token_ids=(whole[3],)), 0.0))
    assert stopped.run().tokens()["r"] == whole[: place + 1]
    assert finishes(stopped) == [None] * place + [FinishReason.STOP]
    ended = driver()
    table = ended.engine.requests
    table._model = type(table._model)(**{**as_dict(table._model), "eos_token_ids": (whole[3],)})
    ended.submit(AddRequest("eos", prompt, SamplingParams(6), 0.0))
    assert ended.run().tokens()["eos"] == whole[: place + 1]
    assert finishes(ended)[-1] is FinishReason.STOP


def as_dict(model: Any) -> dict[str, Any]:
    return {name: getattr(model, name) for name in type(model).__dataclass_fields__}
