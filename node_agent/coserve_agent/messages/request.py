"""A request of the Messages API, and the same as a request for a chat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, StrictBool, ValidationError

from coserve_agent.chat.message import StrictModel, without_nulls
from coserve_agent.http.errors import bad_request
from coserve_agent.messages.blocks import Message, TextBlocks, content_of, messages_of
from coserve_agent.messages.thinking import ThinkingOptions
from coserve_agent.messages.tools import Tool, ToolChoice
from coserve_agent.requests.chat import ChatRequest, parse_chat
from coserve_agent.requests.common import explain
from coserve_agent.requests.sampling import Length, SamplingRequest, Stops
from coserve_agent.requests.supported import EMPTY, Neutral, anything, check_supported, neutral
from coserve_agent.requests.system import with_system
from coserve_agent.requests.tools import MOST_TOOLS

MOST_MESSAGES = 4096
NEUTRAL: Mapping[str, Neutral] = {
    # harmless: they concern Anthropic's own platform
    **dict.fromkeys(("metadata", "service_tier", "cache_control", "inference_geo", "diagnostics"), anything),
    **dict.fromkeys(("user_profile_id", "workspace_id"), anything),
    "speed": neutral("standard"),
    "container": EMPTY,
    "mcp_servers": EMPTY,
    "context_management": neutral({}, {"edits": []}, {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}),
    "stop": EMPTY,
}
"""What changes nothing at the given values."""
REMEDIES = {"stop": "use stop_sequences"}
FIELDS = {
    "response_format.json_schema.schema": "output_config.format.schema",
    "response_format": "output_config.format",
    "].function.parameters": "].input_schema",
}
"""Of a chat, as they are named here."""


class OutputFormat(StrictModel):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(StrictModel):
    """ "high" is the effort of a request that does not say."""

    effort: Literal["high"] | None = None
    format: OutputFormat | None = None


class CountTokensRequest(StrictModel):
    """What a prompt is made of."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    system: TextBlocks | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingOptions | None = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: Annotated[dict[str, Any], BeforeValidator(without_nulls), Field(max_length=32)] | None = None

    def of_chat(self, variables: Mapping[str, Any], *, thoughts: bool) -> ChatRequest:
        """The request for the same answer; `variables` of the chat template are those that it asks for in other words,
        and `thoughts`: the template writes what was thought.

        Raises:
            ApiError: 400 naming the field that is wrong.
        """
        messages = messages_of(self.messages, thoughts=thoughts)
        # An answer that has begun goes on.
        continues = messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls")
        asked: dict[str, Any] = {
            "model": self.model,
            "messages": with_system(None if self.system is None else content_of(self.system), messages),
            "tools": [tool.of_chat() for tool in self.tools or ()],
            "chat_template_kwargs": {**variables, **(self.chat_template_kwargs or {})},
            "continue_final_message": continues,
            "add_generation_prompt": not continues,
        }
        if self.tool_choice is not None:
            if not self.tools and self.tool_choice.type in ("any", "tool"):
                raise bad_request(
                    f"tool_choice.type is {self.tool_choice.type!r} and there are no tools; send tools, or leave "
                    "tool_choice out",
                    "tool_choice",
                    "invalid_value",
                )
            asked |= self.tool_choice.of_chat()
        if self.output_config is not None and self.output_config.format is not None:
            schema = {"name": "output", "schema": self.output_config.format.schema_}
            asked["response_format"] = {"type": "json_schema", "json_schema": schema}
        return parse_chat(asked | self._asked())

    def _asked(self) -> dict[str, Any]:
        """What else a chat is asked for."""
        return {}


class MessagesRequest(CountTokensRequest, SamplingRequest):
    """Names beyond Anthropic's are vLLM's, as in chats."""

    max_tokens: Length
    stop_sequences: Stops | None = None
    stream: StrictBool | None = None

    def _asked(self) -> dict[str, Any]:
        sampling = self.model_dump(include=set(SamplingRequest.model_fields), exclude_unset=True)
        return sampling | {"max_tokens": self.max_tokens, "stream": self.stream, "stop": self.stop_sequences}


R = TypeVar("R", bound=CountTokensRequest)


def parse_messages(kind: type[R], body: Mapping[str, Any]) -> R:
    """Raises ApiError 400 naming the field that is wrong, or not supported."""
    try:
        known = frozenset(kind.model_fields)
        return kind.model_validate(check_supported(body, known, NEUTRAL, REMEDIES))
    except ValidationError as error:
        raise explain(error) from None
