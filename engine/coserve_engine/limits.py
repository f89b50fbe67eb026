"""Which requests can run at all: what a request may ask for, and how it is told what is wrong."""

from __future__ import annotations

import sys

from coserve_engine.errors import RequestError
from coserve_engine.messages import MAX_LOGPROBS, AddRequest, SamplingParams

LARGEST = sys.float_info.max
"""Compared with, never converted to: Python's integers may be larger, and then no float holds them."""
LARGEST_SCORE = 1e30
"""Logits are float32: what is added to one, multiplied by it or divided by, counted a million times, stays finite."""
MAX_SHOWN = 10**20


def check(command: AddRequest, vocab_size: int, max_model_length: int) -> None:
    """Raises RequestError for a request that cannot run on a model of this size, whatever else runs."""
    prompt, params = command.prompt, command.params
    if not prompt:
        raise RequestError("invalid_token", "the prompt has no tokens; send at least one")
    if params.max_tokens < 1:
        raise RequestError("invalid_token", f"max_tokens is {shown(params.max_tokens)}; it must be at least 1")
    if len(prompt) + params.max_tokens > max_model_length:
        raise RequestError(
            "context_length_exceeded",
            f"This model's maximum context length is {max_model_length} tokens, and the prompt has {len(prompt)} with "
            f"max_tokens {shown(params.max_tokens)}; shorten the prompt or lower max_tokens",
        )
    if not 0 <= min(prompt) <= max(prompt) < vocab_size:
        raise RequestError("invalid_token", f"the prompt has a token outside the vocabulary of {vocab_size}")
    for name, seconds in (("ttft_s", command.ttft_s), ("tpot_s", command.tpot_s)):
        if seconds is not None and not 0 < seconds <= LARGEST:
            raise RequestError("invalid_slo", f"{name} is {shown(seconds)}; it must be a positive number of seconds")
    _check_numbers(params)
    for name, tokens in (
        ("stop_token_ids", params.stop_token_ids),
        ("logit_bias", tuple(token for token, _ in params.logit_bias)),
    ):
        wrong = [token for token in tokens if not 0 <= token < vocab_size]
        if wrong:
            raise _refused(name, f"has token {shown(wrong[0])}; it must be from 0 to {vocab_size - 1}")


def _check_numbers(params: SamplingParams) -> None:
    allowed = (
        ("temperature", params.temperature, 0.0, LARGEST_SCORE),
        ("top_p", params.top_p, 0.0, 1.0),
        ("min_p", params.min_p, 0.0, 1.0),
        ("top_k", params.top_k, 0, LARGEST),
        ("repetition_penalty", params.repetition_penalty, 1.0 / LARGEST_SCORE, LARGEST_SCORE),
        ("presence_penalty", params.presence_penalty, -LARGEST_SCORE, LARGEST_SCORE),
        ("frequency_penalty", params.frequency_penalty, -LARGEST_SCORE, LARGEST_SCORE),
        ("min_tokens", params.min_tokens, 0, params.max_tokens),
        ("logprobs", params.logprobs or 0, 0, MAX_LOGPROBS),
        ("prompt_logprobs", params.prompt_logprobs or 0, 0, MAX_LOGPROBS),
    )
    for name, value, low, high in allowed:
        wrong = outside(value, low, high)
        if wrong:
            raise _refused(name, wrong)
    for token, value in params.logit_bias:
        wrong = outside(value, -LARGEST_SCORE, LARGEST_SCORE)
        if wrong:
            raise _refused("logit_bias", f"of token {shown(token)} {wrong}")


def outside(value: float, low: float, high: float) -> str:
    """What is said of a number that is not from `low` to `high`; empty where it is."""
    if low <= value <= high:
        return ""
    return f"is {shown(value)}; it must be a finite number from {low:g} to {high:g}"


def shown(value: float) -> str:
    """A number as it stands in a message: Python refuses to write integers of thousands of digits."""
    if isinstance(value, int) and abs(value) > MAX_SHOWN:
        return f"{'below -' if value < 0 else 'above '}{MAX_SHOWN:g}"
    return str(value)


def _refused(field: str, what: str) -> RequestError:
    return RequestError("invalid_parameter", f"{field} {what}", field)
