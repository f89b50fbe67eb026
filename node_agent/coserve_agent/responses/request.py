"""A request of the Responses API, and the same as a request for a chat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StrictBool, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from coserve_agent.chat.message import StrictModel, without_nulls
from coserve_agent.http.errors import bad_request
from coserve_agent.requests.chat import ChatRequest, parse_chat
from coserve_agent.requests.common import explain
from coserve_agent.requests.sampling import Length, OneOrMoreStops, SamplingRequest
from coserve_agent.requests.shapes import Other, Text, by_shape, of_text
from coserve_agent.requests.structured import Name
from coserve_agent.requests.supported import EMPTY, OFF, PLATFORM, Neutral, anything, check_supported, neutral
from coserve_agent.requests.system import with_system
from coserve_agent.requests.tools import MOST_TOOLS, FunctionDefinition
from coserve_agent.responses.items import MOST_ITEMS, Item, messages_of

_STATELESS = "nothing is stored here: send the conversation so far in input"
NEUTRAL: Mapping[str, Neutral] = {
    **PLATFORM,
    "prompt_cache_options": anything,
    "max_tool_calls": anything,  # of OpenAI's own tools, which are not there
    "priority": anything,
    "request_id": anything,
    "top_logprobs": neutral(0),
    "background": OFF,
    "previous_response_id": neutral(),
    "conversation": neutral(),
    "prompt": neutral(),
    "truncation": neutral("disabled"),
    "context_management": EMPTY,
    "moderation": EMPTY,
    "access_programs": EMPTY,
}
"""What changes nothing at the given values."""
REMEDIES = {
    "previous_response_id": _STATELESS,
    "conversation": _STATELESS,
    "background": "an answer comes with its request alone: leave it out, and set stream if it takes long",
    "prompt": "no templates are stored here: send instructions and input",
    "truncation": "a conversation that is too long is a 400: leave it out, and shorten input yourself",
}
FIELDS = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format.json_schema.schema": "text.format.schema",
    "response_format": "text.format",
    "].function.parameters": "].parameters",
}
"""Of a chat, as they are named here."""
_SHOWN = {"reasoning.encrypted_content", "file_search_call.results", "web_search_call.results"}
_SHOWN |= {"web_search_call.action.sources", "code_interpreter_call.outputs", "message.input_image.image_url"}
_SHOWN |= {"computer_call_output.output.image_url"}
"""What `include` may name: these are of items that no answer has, or are there in plain words."""


def _included(value: object) -> object:
    if isinstance(value, str) and value not in _SHOWN:
        raise PydanticCustomError("included", "this is not to be had here; remove it")
    return value


class FunctionTool(FunctionDefinition):
    type: Literal["function"]

    @model_validator(mode="before")
    @classmethod
    def _only_functions(cls, value: object) -> object:
        kind = value.get("type", "function") if isinstance(value, dict) else "function"
        if kind != "function":
            raise PydanticCustomError(
                "tool",
                "tools of type {kind} are not there; only functions, which the client calls, are: remove it",
                {"kind": f"{kind!r:.80}"},
            )
        return value

    def of_chat(self) -> dict[str, Any]:
        return {"type": "function", "function": self.model_dump(exclude={"type"}, exclude_unset=True)}


class NamedFunction(StrictModel):
    type: Literal["function"]
    name: Name


ToolChoice = Annotated[Annotated[Literal["none", "auto", "required"], of_text] | Other[NamedFunction], by_shape]


class TextFormat(StrictModel):
    """The schema is enforced whatever `strict` says."""

    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: StrictBool | None = None

    def of_chat(self) -> dict[str, Any]:
        """Raises ApiError 400 for a schema that is missing, or not wanted."""
        schema = self.model_dump(exclude={"type"}, exclude_unset=True, by_alias=True)
        if self.type != "json_schema" and not schema:
            return {"type": self.type}
        if self.type == "json_schema" and self.name is not None and self.schema_ is not None:
            return {"type": self.type, "json_schema": schema}
        said = f"text.format.type is {self.type!r}"
        wrong = "name and schema are both needed" if self.type == "json_schema" else f"{', '.join(schema)} given"
        raise bad_request(f"{said} and {wrong}; they belong to the type 'json_schema'", "text", "invalid_value")


class TextOptions(StrictModel):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningOptions(StrictModel):
    """A model thinks as its template lets it; what it thought is shown as it is, and not summarised."""

    effort: Literal["none"] | None = None
    summary: Literal["auto"] | None = None
    generate_summary: Literal["auto"] | None = None


class StreamOptions(StrictModel):
    include_obfuscation: StrictBool | None = None


class ResponsesRequest(SamplingRequest):
    """Names beyond OpenAI's are vLLM's, as in chats."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    input: Annotated[Text | Other[Annotated[list[Item], Field(min_length=1, max_length=MOST_ITEMS)]], by_shape]
    instructions: str | None = None
    max_output_tokens: Length | None = None
    stop: OneOrMoreStops | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: (
        Annotated[Annotated[Literal["none", "auto", "required"], of_text] | Other[NamedFunction], by_shape] | None
    ) = None
    parallel_tool_calls: StrictBool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: list[Annotated[str, BeforeValidator(_included)]] | None = None
    metadata: Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=16)] | None = None
    store: StrictBool | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    include_metrics: StrictBool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], BeforeValidator(without_nulls), Field(max_length=32)] | None = None

    def of_chat(self, *, thoughts: bool) -> ChatRequest:
        """The request for the same answer; `thoughts`: the chat template writes what was thought.

        Raises:
            ApiError: 400 naming the field that is wrong.
        """
        messages = (
            [{"role": "user", "content": self.input}]
            if isinstance(self.input, str)
            else messages_of(self.input, thoughts=thoughts)
        )
        asked = self.model_dump(include=set(SamplingRequest.model_fields) | _ALIKE, exclude_unset=True)
        asked |= {
            "messages": with_system(self.instructions, messages),
            "max_tokens": self.max_output_tokens,
            "tools": [tool.of_chat() for tool in self.tools or ()],
            "tool_choice": self.tool_choice,
        }
        if isinstance(self.tool_choice, NamedFunction):
            asked["tool_choice"] = {"type": "function", "function": {"name": self.tool_choice.name}}
        if self.text is not None and self.text.format is not None:
            asked["response_format"] = self.text.format.of_chat()
        return parse_chat(asked)


_ALIKE = {"model", "stop", "parallel_tool_calls", "stream", "chat_template_kwargs"}
"""What has the same name in a chat."""


def parse_responses(body: Mapping[str, Any]) -> ResponsesRequest:
    """Raises ApiError 400 naming the field that is wrong, or not supported."""
    try:
        known = frozenset(ResponsesRequest.model_fields)
        return ResponsesRequest.model_validate(check_supported(body, known, NEUTRAL, REMEDIES))
    except ValidationError as error:
        raise explain(error) from None
