"""A request for completions of one or several prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, cast

from pydantic import Field, StrictBool, StrictInt, ValidationError, field_validator

from coserve_agent.http.errors import bad_request
from coserve_agent.requests.common import Common, check_streamable, explain
from coserve_agent.requests.sampling import Count
from coserve_agent.requests.supported import check_supported
from coserve_engine.messages import MAX_LOGPROBS


class CompletionRequest(Common):
    prompt: str | list[StrictInt] | list[str] | list[list[StrictInt]]
    max_tokens: Count | None = None
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
    check_streamable(parsed)
    return parsed
