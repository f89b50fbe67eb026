"""Tools that a request offers, and what of them is wanted, in OpenAI's words."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, field_validator

from coserve_agent.chat.message import StrictModel
from coserve_agent.http.errors import bad_request
from coserve_agent.requests.structured import Name

MOST_TOOLS = 128


class FunctionDefinition(StrictModel):
    """`parameters` is a JSON Schema of an object; without it the function takes no arguments."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None

    @field_validator("parameters")
    @classmethod
    def _of_an_object(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        kind = None if value is None else value.get("type", "object")
        if kind not in (None, "object"):
            raise ValueError(f"its type is {kind!r:.80}; arguments are an object: write 'object'")
        return value


class Tool(StrictModel):
    type: Literal["function"]
    function: FunctionDefinition

    def shown(self) -> dict[str, Any]:
        """What a chat template gets: `strict` is for the server alone."""
        more = {"description": self.function.description, "parameters": self.function.parameters}
        given = {name: value for name, value in more.items() if value is not None}
        return {"type": self.type, "function": {"name": self.function.name, **given}}


class FunctionName(StrictModel):
    name: Name


class NamedTool(StrictModel):
    type: Literal["function"]
    function: FunctionName


class ToolRequest(StrictModel):
    """The fields of a chat request that are about tools."""

    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: StrictBool | None = None

    @property
    def wants_calls(self) -> bool:
        """Whether its answer may have calls."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def must_call(self) -> bool:
        """Whether its answer is to be calls."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def callable(self) -> dict[str, int]:
        """Those that may be called, by name, and their places in `tools`."""
        wanted = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        named = {tool.function.name: n for n, tool in enumerate(self.tools or ())}
        return named if wanted is None else {wanted: named[wanted]}


def check_tools(request: ToolRequest) -> None:
    """Raises ApiError 400 for a name that two tools have, and a choice of what is not there."""
    tools = request.tools or []
    names = [tool.function.name for tool in tools]
    twice = next((name for n, name in enumerate(names) if name in names[:n]), None)
    if twice is not None:
        raise bad_request(f"tools has two functions named {twice!r}; rename one of them", "tools", "invalid_value")
    choice = request.tool_choice
    if request.must_call and not tools:
        shown = repr(choice) if isinstance(choice, str) else "a function"
        raise bad_request(
            f"tool_choice is {shown} and there are no tools; send tools, or leave tool_choice out",
            "tool_choice",
            "invalid_value",
        )
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise bad_request(
            f"tool_choice names the function {choice.function.name!r}, which tools does not have; it has "
            f"{', '.join(names)[:200]}",
            "tool_choice",
            "invalid_value",
        )
