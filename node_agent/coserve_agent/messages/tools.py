"""Tools and their choice in the Messages API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, field_validator, model_validator
from pydantic_core import PydanticCustomError

from coserve_agent.chat.message import StrictModel
from coserve_agent.requests.structured import Name


class Tool(StrictModel):
    """A tool of the client's. What it says of caching and of how its input is streamed changes no answer."""

    type: Literal["custom"] | None = None
    name: Name
    description: str | None = None
    input_schema: dict[str, Any]
    strict: StrictBool | None = None
    cache_control: dict[str, Any] | None = None
    eager_input_streaming: bool | None = None
    defer_loading: Literal[False] | None = None
    allowed_callers: list[Literal["direct"]] | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_clients(cls, value: object) -> object:
        kind = value.get("type") if isinstance(value, dict) else None
        if kind not in (None, "custom"):
            raise PydanticCustomError(
                "tool",
                "tools of type {kind} are not there; only those that the client describes by an input_schema are: "
                "remove it",
                {"kind": f"{kind!r:.80}"},
            )
        return value

    @field_validator("input_schema")
    @classmethod
    def _of_an_object(cls, value: dict[str, Any]) -> dict[str, Any]:
        if value.get("type") not in (None, "object"):
            raise ValueError(f"its type is {value['type']!r:.80}; an input is an object: write 'object'")
        return value

    def of_chat(self) -> dict[str, Any]:
        more = {"description": self.description, "strict": self.strict}
        given = {name: value for name, value in more.items() if value is not None}
        return {"type": "function", "function": {"name": self.name, "parameters": self.input_schema, **given}}


class ToolChoice(StrictModel):
    type: Literal["auto", "any", "tool", "none"]
    name: Annotated[Name | None, Field(description="with type 'tool'")] = None
    disable_parallel_tool_use: StrictBool | None = None

    @model_validator(mode="after")
    def _named_where_it_is_one(self) -> ToolChoice:
        if (self.name is not None) != (self.type == "tool"):
            wrong = "missing" if self.name is None else "given"
            said = f"name is {wrong} where type is {self.type!r}; it belongs to the type 'tool'"
            raise PydanticCustomError("choice", said)
        return self

    def of_chat(self) -> dict[str, Any]:
        """The fields of a chat that say the same."""
        choice: Any = {"any": "required"}.get(self.type, self.type)
        if self.name is not None:
            choice = {"type": "function", "function": {"name": self.name}}
        return {"tool_choice": choice, "parallel_tool_calls": not self.disable_parallel_tool_use}
