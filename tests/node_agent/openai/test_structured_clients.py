"""Structured output as the openai client's helpers ask for it, and with schemas as pydantic writes them. LangChain and
LiteLLM were seen to send the same: the former by default, the latter where `strict` is not true.
"""

from __future__ import annotations

import datetime
import json
import uuid
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field, HttpUrl

CHAT: Any = [{"role": "user", "content": "the quick"}]


class Colour(Enum):
    RED = "red"
    GREEN = "grün"


class Place(BaseModel):
    """Where it is."""

    city: Annotated[str, Field(max_length=3, description="its name")]
    code: Annotated[str, Field(pattern=r"^[A-Z]{2}-\d$")]
    floor: Annotated[int, Field(ge=-1, le=9)] = 0


class Circle(BaseModel):
    kind: Literal["circle"]
    radius: Annotated[float, Field(gt=0, lt=5)]


class Square(BaseModel):
    kind: Literal["square"]
    side: Annotated[int, Field(multiple_of=5, ge=5, le=50)]


class Report(BaseModel):
    place: Place
    other: Place | None = None
    colour: Colour
    level: Literal["low", "high", 3]
    at: datetime.date
    done: bool


class Shapes(BaseModel):
    shapes: Annotated[list[Annotated[Circle | Square, Field(discriminator="kind")]], Field(min_length=1, max_length=2)]
    pair: tuple[int, bool] | None


class Times(BaseModel):
    moment: datetime.datetime
    clock: datetime.time
    id: uuid.UUID


class Loose(BaseModel):
    """What its schema says less of than pydantic checks."""

    link: HttpUrl
    price: Decimal
    counts: dict[str, int]
    note: str | None = None


class Tree(BaseModel):
    name: Literal["leaf", "node"]
    below: Annotated[list[Tree], Field(max_length=1)] = []


MODELS = [Report, Shapes, Times, Tree]


@pytest.fixture(scope="module")
def options(served: Any) -> dict[str, Any]:
    """Of a random model: room, and a bias by which it closes what it opens."""
    likes = {b'"': 6, b"}": 6, b"]": 6, b",": -3} | dict.fromkeys((b" ", b"\n", b"\t", b"\r"), -12)
    likes |= {str(digit).encode(): -1 for digit in range(10)}
    pieces = served.agent.tokenizer.pieces
    bias = {str(token): likes[text] for token in range(4, 320) if (text := pieces.bytes_of(token)) in likes}
    return {"model": "base", "messages": CHAT, "max_tokens": 230, "temperature": 1, "seed": 2, "logit_bias": bias}


@pytest.mark.parametrize("model", MODELS)
def test_parse_gives_the_clients_own_model(
    client: openai.OpenAI, options: dict[str, Any], model: type[BaseModel]
) -> None:
    answer = client.chat.completions.parse(response_format=model, **options)
    assert isinstance(answer.choices[0].message.parsed, model)
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(response_format=model, **options | {"max_tokens": 3})


def test_a_stream_that_is_parsed_as_it_comes(client: openai.OpenAI, options: dict[str, Any]) -> None:
    with client.chat.completions.stream(response_format=Report, **options) as stream:
        kinds = [event.type for event in stream]
        parsed = stream.get_final_completion().choices[0].message.parsed
    assert kinds.count("content.delta") > 20
    assert kinds[-1] == "content.done"
    assert parsed == client.chat.completions.parse(response_format=Report, **options).choices[0].message.parsed


@pytest.mark.parametrize("model", [*MODELS, Loose])
def test_schemas_as_pydantic_writes_them(
    client: openai.OpenAI, options: dict[str, Any], model: type[BaseModel]
) -> None:
    """Not as OpenAI wants them: with defaults, and with names that need not come."""
    plain = model.model_json_schema()
    for body in (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": plain, "strict": False}}},
        {"extra_body": {"guided_json": json.dumps(plain)}},
    ):
        choice = client.chat.completions.create(**options, **body).choices[0]
        if choice.finish_reason == "stop":
            jsonschema.validate(json.loads(choice.message.content), plain)
            assert model is Loose or model.model_validate_json(choice.message.content)
        else:
            assert model is Loose, "any number of names may come"


@pytest.mark.parametrize(
    ("annotation", "keyword"), [(set[int], "uniqueItems"), (dict[Literal["a"], int], "propertyNames")]
)
def test_what_cannot_be_enforced_is_refused_and_not_dropped(
    client: openai.OpenAI, options: dict[str, Any], annotation: Any, keyword: str
) -> None:
    class Model(BaseModel):
        value: annotation

    schema = Model.model_json_schema()
    assert keyword in json.dumps(schema)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**options, extra_body={"guided_json": schema})
    assert caught.value.param == "guided_json"
    assert "the schema's #/properties/value" in str(caught.value)
