"""A request for a chat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, StrictBool, StrictInt, ValidationError

from coserve_agent.chat.message import ChatMessage, without_nulls
from coserve_agent.http.errors import bad_request
from coserve_agent.requests.common import Common, check_streamable, explain
from coserve_agent.requests.sampling import Length
from coserve_agent.requests.supported import check_supported
from coserve_agent.requests.tools import ToolRequest, check_tools
from coserve_engine.messages import MAX_LOGPROBS


class ChatRequest(ToolRequest, Common):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Length | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    chat_template_kwargs: Annotated[dict[str, Any], BeforeValidator(without_nulls), Field(max_length=32)] | None = None
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool | None = None

    @property
    def output_logprobs(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None


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
    if parsed.continue_final_message and parsed.add_generation_prompt:
        raise bad_request(
            "continue_final_message and add_generation_prompt are both true, and the prompt can end in one way alone; "
            "set one of them to false",
            "continue_final_message",
            "invalid_value",
        )
    check_streamable(parsed)
    check_tools(parsed)
    return parsed
