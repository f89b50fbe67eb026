"""What chats and completions may both ask for, and the words for a parameter that is wrong."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictInt, ValidationError, field_validator

from coserve_agent.chat.message import StrictModel, fault
from coserve_agent.http.errors import ApiError, bad_request
from coserve_agent.requests.sampling import Length, OneOrMoreStops, SamplingRequest
from coserve_agent.requests.structured import StructuredRequest
from coserve_engine.messages import MAX_LOGPROBS

MAX_CHOICES = 16


class StreamOptions(StrictModel):
    include_usage: StrictBool = False
    continuous_usage_stats: Literal[False] | None = None
    include_obfuscation: StrictBool | None = None


class Common(StructuredRequest, SamplingRequest):
    """What both kinds of completion share. Token counts; names beyond OpenAI's are vLLM's."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    max_tokens: Length | None = None
    stop: OneOrMoreStops | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    prompt_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    return_token_ids: StrictBool | None = None
    return_tokens_as_token_ids: StrictBool | None = None
    include_metrics: StrictBool | None = None

    @field_validator("prompt_logprobs", mode="before")
    @classmethod
    def _no_prompt_logprobs(cls, value: object) -> object:
        return None if value is False else value

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
    if request.stream and request.include_metrics and not (request.stream_options or StreamOptions()).include_usage:
        raise bad_request(
            "include_metrics is true, and a stream has metrics beside its usage alone, as in vLLM; set "
            "stream_options.include_usage to true, or leave include_metrics out",
            "include_metrics",
            "invalid_value",
        )


def explain(error: ValidationError) -> ApiError:
    """One wrong field as a 400."""
    path, what = fault(error)
    path = path or "body"
    return bad_request(f"{path} {what}", path.partition(".")[0], "invalid_value")
