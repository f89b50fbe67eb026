"""What chats and completions may both ask for, and the words for a parameter that is wrong."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictInt, ValidationError, field_validator

from coserve_agent.chat.message import StrictModel, fault, without_nulls
from coserve_agent.http.errors import ApiError, bad_request
from coserve_agent.model.generation_config import MinP, RepetitionPenalty, Temperature, TopK, TopP
from coserve_agent.requests.structured import StructuredRequest
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


class Common(StructuredRequest):
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


def check_streamable(request: Common) -> None:
    """Raises ApiError 400 for what no stream can say."""
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
