"""Which parameters a request may have, and a clear refusal for those that would change the answer but are not
supported.

A parameter that asks for nothing special (null, or the neutral value) is accepted, so that tools that send every field
of OpenAI's API work unchanged. Nothing is ignored silently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Field, StrictBool, StrictInt, ValidationError, field_validator

from coserve_agent.chat.message import ChatMessage, StrictModel, fault, without_nulls
from coserve_agent.http.errors import ApiError, bad_request
from coserve_agent.model.generation_config import MinP, RepetitionPenalty, Temperature, TopK, TopP
from coserve_engine.messages import MAX_LOGPROBS

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_SEED = (1 << 63) - 1
MAX_CHOICES = 16
MAX_BIASES = 1024
MAX_COUNT = (1 << 31) - 1

Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[StrictInt, Field(ge=0, le=MAX_COUNT)]
TokenId = Annotated[int, Field(ge=0)]


class StreamOptions(StrictModel):
    include_usage: StrictBool = False
    continuous_usage_stats: Literal[False] | None = None
    include_obfuscation: StrictBool | None = None


class Common(StrictModel):
    """What both kinds of completion share. Token counts; temperature 0 is greedy. Names beyond OpenAI's are vLLM's."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    max_tokens: Annotated[StrictInt, Field(ge=1, le=MAX_COUNT)] | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    seed: Annotated[StrictInt, Field(ge=-MAX_SEED - 1, le=MAX_SEED)] | None = None
    stop: Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[Count], Field(max_length=64)] | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MAX_CHOICES)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: RepetitionPenalty | None = None
    logit_bias: (
        Annotated[dict[TokenId, Annotated[Number, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)] | None
    ) = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    min_tokens: Count | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: StrictBool | None = None
    prompt_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    return_token_ids: StrictBool | None = None
    return_tokens_as_token_ids: StrictBool | None = None

    @field_validator("prompt_logprobs", mode="before")
    @classmethod
    def _no_prompt_logprobs(cls, value: object) -> object:
        return None if value is False else value

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _given_biases(cls, value: object) -> object:
        return without_nulls(value)

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @property
    def output_logprobs(self) -> int | None:
        """None, or how many of the likeliest tokens to report beside each chosen one."""
        raise NotImplementedError

    @property
    def scored_prompt(self) -> int | None:
        """The same for the tokens of the prompt."""
        return self.prompt_logprobs


class ChatRequest(Common):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1, le=MAX_COUNT)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    chat_template_kwargs: Annotated[dict[str, Any], BeforeValidator(without_nulls), Field(max_length=32)] | None = None

    @property
    def output_logprobs(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None


class CompletionRequest(Common):
    prompt: str | list[StrictInt] | list[str] | list[list[StrictInt]]
    max_tokens: Annotated[StrictInt, Field(ge=0, le=MAX_COUNT)] | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: StrictBool | None = None

    @field_validator("logprobs", mode="before")
    @classmethod
    def _none_for_false(cls, value: object) -> object:
        return None if value is False else value

    @property
    def output_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def scored_prompt(self) -> int | None:
        wanted = [top for top in (self.logprobs if self.echo else None, self.prompt_logprobs) if top is not None]
        return max(wanted, default=None)

    @property
    def prompts(self) -> Sequence[str] | Sequence[list[int]]:
        """What `prompt` holds, one or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return cast("Sequence[str] | Sequence[list[int]]", self.prompt)


def _neutral(*values: object) -> Callable[[object], bool]:
    # `is` for booleans: 1 == True would let logprobs=1 pass for True.
    return lambda value: any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in values)


def _anything(value: object) -> bool:
    return True


_EMPTY = _neutral([], {}, "")
_OFF = _neutral(False)

# What changes nothing at the given values. null is neutral everywhere.
NEUTRAL: Mapping[str, Callable[[object], bool]] = {
    # harmless: they concern OpenAI's own platform
    **dict.fromkeys(
        ("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
        _anything,
    ),
    "store": _anything,
    "parallel_tool_calls": _anything,
    "priority": _anything,
    "request_id": _anything,
    # they would change the answer
    "best_of": _neutral(1),
    "top_logprobs": _neutral(0),
    "echo": _OFF,
    "suffix": _EMPTY,
    "length_penalty": _neutral(1),
    "use_beam_search": _OFF,
    "tools": _EMPTY,
    "tool_choice": _neutral("none", "auto"),
    "functions": _EMPTY,
    "function_call": _neutral("none", "auto"),
    "response_format": _neutral({"type": "text"}),
    "modalities": _neutral(["text"]),
    "audio": _EMPTY,
    "prediction": _EMPTY,
    "reasoning_effort": _neutral("none"),
    "verbosity": _neutral("medium"),
    "web_search_options": _EMPTY,
    "skip_special_tokens": _neutral(True),
    "spaces_between_special_tokens": _neutral(True, False),
    "include_stop_str_in_output": _OFF,
    "add_special_tokens": _neutral(True),
    "add_generation_prompt": _neutral(True),
    "continue_final_message": _OFF,
    "chat_template": _EMPTY,
    "truncate_prompt_tokens": _EMPTY,
    "guided_json": _EMPTY,
    "structured_outputs": _EMPTY,
}


def check_supported(body: Mapping[str, Any], known: frozenset[str]) -> dict[str, Any]:
    """`body` without the neutral parameters.

    Raises:
        ApiError: 400 naming the first parameter that is unknown or asks for something that is not supported.
    """
    kept = {}
    for name, value in body.items():
        if value is None:
            continue
        if name in known:
            kept[name] = value
        elif name not in NEUTRAL:
            raise bad_request(
                f"{name} is no parameter of this API; remove it (supported: {', '.join(sorted(known))})",
                name,
                "unknown_parameter",
            )
        elif not NEUTRAL[name](without_nulls(value)):
            raise bad_request(
                f"{name} is not supported here, and ignoring it would change the answer; remove it",
                name,
                "unsupported_parameter",
            )
    return kept


def parse_chat(body: Mapping[str, Any]) -> ChatRequest:
    try:
        parsed = ChatRequest.model_validate(check_supported(body, frozenset(ChatRequest.model_fields)))
    except ValidationError as error:
        raise explain(error) from None
    if parsed.top_logprobs and not parsed.logprobs:
        raise bad_request(
            f"top_logprobs is {parsed.top_logprobs} but logprobs is not true; set logprobs to true",
            "top_logprobs",
            "invalid_value",
        )
    _check_streamable(parsed)
    return parsed


def parse_completion(body: Mapping[str, Any]) -> CompletionRequest:
    try:
        parsed = CompletionRequest.model_validate(check_supported(body, frozenset(CompletionRequest.model_fields)))
    except ValidationError as error:
        raise explain(error) from None
    if not parsed.prompt:
        raise bad_request("prompt is empty; send a text or at least one token", "prompt", "invalid_value")
    if parsed.max_tokens == 0 and not parsed.echo:
        raise bad_request(
            "max_tokens is 0 and echo is not true, so there would be no answer; set echo to true to score the prompt, "
            "or ask for at least 1",
            "max_tokens",
            "invalid_value",
        )
    _check_streamable(parsed)
    return parsed


def _check_streamable(request: Common) -> None:
    if request.stream and request.prompt_logprobs is not None:
        raise bad_request(
            "prompt_logprobs are not there with stream true, as in vLLM; take one of them out",
            "prompt_logprobs",
            "invalid_value",
        )


def explain(error: ValidationError) -> ApiError:
    """One wrong field as a 400."""
    path, what = fault(error)
    path = path or "body"
    return bad_request(f"{path} {what}", path.partition(".")[0], "invalid_value")
