"""Messages of one request: what it asks for, and what comes of it. `messages` says what holds for all messages."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

MAX_LOGPROBS = 20
"""How many of the likeliest tokens a request may ask to be reported, as in OpenAI's API and vLLM."""


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """An immutable set of adapter weights: `uid` names the lineage (a job or a published name), `number` grows."""

    uid: str
    number: int


class GrammarKind(StrEnum):
    """What a grammar's text is: nothing (any JSON object will do), a JSON Schema, a regular expression that the whole
    answer matches, a JSON array of strings of which the answer is one, or what a server makes of schemas, texts and
    tokens (`grammar.expression`).
    """

    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"
    EXPRESSION = "expression"


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer may be: at each place only tokens are chosen with which it can still become that."""

    kind: GrammarKind
    text: str = ""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens, in vLLM's terms and, as there, applied in this order: penalties, bias, `min_tokens`,
    temperature, `min_p`, `top_k`, `top_p`. A grammar comes before them all.

    Args:
        temperature: 0 is greedy.
        top_p, min_p, top_k: what is left to draw from: the smallest set of the likeliest with this mass; those with
        at least this share of the likeliest one's probability; so many of the likeliest (0: all).
        seed: addresses the randomness, together with the token's position.
        ignore_eos: the model's end tokens end nothing.
        repetition_penalty: of tokens in prompt or output, as in transformers (1: none).
        presence_penalty, frequency_penalty: subtracted for tokens of the output, once and for each time, as in
        OpenAI's API.
        logit_bias: (token, what is added to its logit).
        min_tokens: no token that would end the output is chosen before so many.
        logprobs: None, or how many of the likeliest tokens to report beside the chosen one, 0 to MAX_LOGPROBS.
        prompt_logprobs: the same for the tokens of the prompt.
        grammar: what the answer may be. Tokens that would end it are then chosen where it is whole and nowhere else;
        `min_tokens` and `ignore_eos` put that off only as long as the grammar lets something else follow.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class AddRequest:
    """Generate from `prompt` under `params`; `arrival_s` starts the clock of the time to first token. No other request
    that waits or runs may have its id.

    `ttft_s` and `tpot_s` are this request's own promise; None: the engine's.
    """

    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    arrival_s: float
    adapter: AdapterVersion | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None


@dataclass(frozen=True, slots=True)
class Cancel:
    """Forget a request and free what it holds. No further event names it. Unknown ids are ignored."""

    request_id: str


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities where one token was chosen, of the model's own distribution (nothing of SamplingParams is
    applied): the token's and its rank (1: the likeliest; equally likely ones share the last of their ranks, as in
    vLLM), and the likeliest tokens' with theirs, likeliest first.
    """

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class PromptDone:
    """A request's prompt is computed; comes once, before its first token.

    `cached_tokens` of it were found in the KV cache. `logprobs`, if asked for, has one entry a token of the prompt;
    the first token follows nothing and has None. `placed_s` is when the request got a place.
    """

    request_id: str
    cached_tokens: int
    logprobs: tuple[TokenLogprobs | None, ...] | None
    placed_s: float = 0.0


class Token(NamedTuple):
    """One sampled token of a request; `finish` is set on its last. `emitted_s` is when the engine had it."""

    request_id: str
    token: int
    finish: FinishReason | None
    emitted_s: float
    logprobs: TokenLogprobs | None = None


class Emission(NamedTuple):
    """How the forward went that gave tokens: it ended `late_s` after it was to end by plan (before, where negative),
    and the machine's pauses in iterations came to `paused_s` until then since the engine's start. `finetuned`: it had
    finetuning rows, or backward ran between it and the forward before; `prefilled`: it had rows of prompts.
    """

    late_s: float
    paused_s: float
    finetuned: bool
    prefilled: bool


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """All tokens of one iteration."""

    tokens: tuple[Token, ...]
    emission: Emission


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """A request that cannot run; `code` is stable: unknown_adapter, context_length_exceeded, invalid_token,
    invalid_parameter, invalid_slo, duplicate_request (another of this id waits or runs, and goes on), overloaded (too
    many are waiting), internal_error. `field` of SamplingParams is at fault, if one is.
    """

    request_id: str
    code: str
    message: str
    field: str | None = None
