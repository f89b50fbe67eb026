"""The grammar of an answer that has to be calls: in the model's own form, with arguments by each function's schema."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from coserve_agent.text.pieces import Pieces
from coserve_agent.tools.format import Format, Part, Schema
from coserve_agent.tools.thought_parser import Tags
from coserve_engine.grammar.vocabulary import is_markup
from coserve_engine.messages import Grammar, GrammarKind

Expression = str | dict[str, Any]
Functions = Mapping[str, tuple[str, dict[str, Any]]]
"""By name: where in the request the schema of the arguments stands, and the schema."""


def calls_grammar(
    form: Format, functions: Functions, pieces: Pieces, *, several: bool, tags: Tags | None, thinking: bool
) -> Grammar:
    """Of one call, or of `several`. A model with `tags` may think before; where it is `thinking`, it does already."""
    ids = {text: id for id, text in pieces.added.items() if id in pieces.special or is_markup(text)}

    def written(part: Part, schema: Expression) -> Expression:
        if isinstance(part, Schema):
            return schema
        if isinstance(part, str):
            return part
        return _token(ids, part.text)

    def row(parts: Sequence[Part], schema: Expression = "") -> list[Expression]:
        return [written(part, schema) for part in parts]

    of = {name: form.written(name) for name in functions}
    some = next(iter(of.values()))
    calls = [
        _all(row(of[name].call, {"schema": schema, "where": where})) for name, (where, schema) in functions.items()
    ]
    call: Expression = {"any": calls}
    if several and some.between is not None:
        call = {"several": call} | ({"between": _all(row(some.between))} if some.between else {})
    thought = [] if tags is None else _thought(ids, tags, thinking)
    whole = _all([*thought, *row(some.opening), call, *row(some.closing)])
    return Grammar(GrammarKind.EXPRESSION, json.dumps(whole, ensure_ascii=False))


def _thought(ids: Mapping[str, int], tags: Tags, thinking: bool) -> list[Expression]:
    rest: list[Expression] = [{"until": _token(ids, tags.closing)}, {"maybe": "\n\n"}]
    return rest if thinking else [{"maybe": _all([_token(ids, tags.opening), *rest])}]


def _token(ids: Mapping[str, int], text: str) -> Expression:
    return {"token": ids[text], "text": text} if text in ids else text


def _all(parts: Iterable[Expression]) -> Expression:
    return {"all": list(parts)}


def arguments_schema(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """Of a function's `parameters`, as OpenAI's API has them: without them it takes none, and they are an object's."""
    if parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object", **parameters}
