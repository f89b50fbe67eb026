"""Structured output: what an answer may be, in OpenAI's words (`response_format`) and in vLLM's, today's and older."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StrictBool
from pydantic_core import PydanticCustomError

from coserve_agent import strict_json
from coserve_agent.chat.message import StrictModel
from coserve_agent.http.errors import bad_request
from coserve_engine.messages import Grammar, GrammarKind


def _unsupported(value: object) -> None:
    if value is not False:
        said = "this is not supported here, and ignoring it would change the answer; remove it"
        raise PydanticCustomError("unsupported", said)


SchemaOrText = str | dict[str, Any]
"""A JSON Schema, or its JSON."""
Choices = Annotated[list[str], Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
"""Of a schema or a function, as OpenAI takes it."""
Unsupported = Annotated[None, BeforeValidator(_unsupported)]


class JsonSchema(StrictModel):
    """The schema is enforced whatever `strict` says, as in vLLM."""

    name: Name
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: StrictBool | None = None


class ResponseFormat(StrictModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(StrictModel):
    json_: Annotated[SchemaOrText | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Choices | None = None
    json_object: StrictBool | None = None
    grammar: Unsupported = None
    structural_tag: Unsupported = None
    whitespace_pattern: Unsupported = None
    disable_fallback: Unsupported = None
    disable_any_whitespace: Unsupported = None
    disable_additional_properties: Unsupported = None


class StructuredRequest(StrictModel):
    """The fields of a request that say what the answer may be; one of them at most does."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: SchemaOrText | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None


@dataclass(frozen=True)
class Structure:
    """A grammar, and the client's field that has it: `structured_outputs.regex`."""

    field: str
    grammar: Grammar

    @property
    def param(self) -> str:
        """The field of the request."""
        return self.field.partition(".")[0]


def structure_of(request: StructuredRequest) -> Structure | None:
    """What the answer of a request is held to, if anything.

    Raises:
        ApiError: 400 for none, or two, where one is to be, and for a schema that is no JSON.
    """
    asked = list(_asked(request))
    if len(asked) > 1:
        first, second, *_ = (one.field for one in asked)
        raise bad_request(
            f"{second} says what the answer may be, and so does {first}; take one of them out",
            asked[1].param,
            "invalid_value",
        )
    if not asked and request.structured_outputs is not None:
        raise bad_request(
            "structured_outputs says nothing of the answer; it must have one of json, regex, choice and json_object "
            "(true), or be left out",
            "structured_outputs",
            "invalid_value",
        )
    return asked[0] if asked else None


def _asked(request: StructuredRequest) -> Iterator[Structure]:
    if request.response_format is not None:
        yield from _format(request.response_format)
    outputs = request.structured_outputs or StructuredOutputs()
    if outputs.json_object:
        yield Structure("structured_outputs.json_object", Grammar(GrammarKind.JSON_OBJECT))
    for field, schema in (("structured_outputs.json", outputs.json_), ("guided_json", request.guided_json)):
        if schema is not None:
            yield Structure(field, _schema(field, schema))
    for field, pattern in (("structured_outputs.regex", outputs.regex), ("guided_regex", request.guided_regex)):
        if pattern is not None:
            yield Structure(field, Grammar(GrammarKind.REGEX, pattern))
    for field, choices in (("structured_outputs.choice", outputs.choice), ("guided_choice", request.guided_choice)):
        if choices is not None:
            yield Structure(field, Grammar(GrammarKind.CHOICE, json.dumps(choices)))


def _format(given: ResponseFormat) -> Iterator[Structure]:
    if (given.json_schema is not None) != (given.type == "json_schema"):
        wrong = "is missing" if given.json_schema is None else "is given"
        said = f"response_format.json_schema {wrong} where response_format.type is {given.type!r}"
        raise bad_request(f"{said}; it belongs to the type 'json_schema'", "response_format", "invalid_value")
    if given.json_schema is not None:
        field = "response_format.json_schema.schema"
        yield Structure(field, _schema(field, given.json_schema.schema_))
    elif given.type == "json_object":
        yield Structure("response_format", Grammar(GrammarKind.JSON_OBJECT))


def _schema(field: str, schema: SchemaOrText) -> Grammar:
    try:
        if isinstance(schema, str):
            schema = strict_json.loads(schema, number=strict_json.whole)
        return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema, ensure_ascii=False))
    except RecursionError:
        said = "it is too deep"
    except ValueError as error:
        said = str(error)
    raise bad_request(f"{field} is no JSON Schema ({said}); send an object", field.partition(".")[0], "invalid_value")
