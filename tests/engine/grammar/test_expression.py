"""Grammars of texts, tokens and schemas: what they let follow, and whose fault one is that cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from grammars import END, allowed, matching
from tokenizers import Tokenizer as Backend

from coserve_engine.errors import RequestError
from coserve_engine.grammar.compiler import Compiler
from coserve_engine.messages import Grammar, GrammarKind

OPEN, CLOSE = 1, 2
BEGIN, DONE = {"token": OPEN, "text": "<|user|>"}, {"token": CLOSE, "text": "<|assistant|>"}
NUMBER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


def expression(part: Any) -> Grammar:
    return Grammar(GrammarKind.EXPRESSION, json.dumps(part))


def takes(of: Compiler, folder: Path, part: Any, *output: str | int) -> bool:
    """Whether an answer may be `output`, texts and tokens, and end there."""
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    tokens = [id for one in output for id in (backend.encode(one).ids if isinstance(one, str) else [one])]
    held = matching(of, expression(part))
    for n, token in enumerate(tokens):
        if token not in allowed(of, held, tokens[:n]):
            return False
    return END in allowed(of, held, tokens)


@pytest.mark.parametrize(
    ("part", "yes", "no"),
    [
        ({"all": ["a", BEGIN, "b"]}, ["a", OPEN, "b"], ["a<|user", "|>b"]),
        ({"any": ["one", "two"]}, ["two"], ["three"]),
        ({"all": [{"maybe": "x"}, {"several": BEGIN}]}, ["x", OPEN, OPEN], ["x"]),
        ({"several": {"any": ["a", BEGIN]}, "between": ", "}, ["a, ", OPEN, ", a"], ["aa"]),
        ({"all": ["(", {"schema": NUMBER, "where": ""}, ")"]}, ['({"n": 1})'], ['({"n": "a"})']),
        ({"all": [{"until": DONE}, "b"]}, ["any\n text", CLOSE, "b"], ["any\n text", OPEN, CLOSE, "b"]),
        ({"all": [{"until": "end"}, "b"]}, ["een endb"], ["een b"]),
    ],
)
def test_what_may_follow(of: Compiler, folder: Path, part: Any, yes: list[str | int], no: list[str | int]) -> None:
    assert takes(of, folder, part, *yes)
    assert not takes(of, folder, part, *no)


def test_a_token_may_come_only_where_it_is_named(of: Compiler) -> None:
    held = matching(of, expression({"all": ["a", BEGIN]}))
    assert {OPEN, CLOSE, END}.isdisjoint(allowed(of, held))


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "object", "properties": {"a": {"contains": 1}}}, r"grammar\[1\]: the schema's #/properties/a/con"),
        (
            {"type": "object", "properties": {"a": {"type": "integer", "minimum": 5, "maximum": 3}}},
            r"grammar\[1\] cannot be compiled: the schema's #/properties/a: ",
        ),
    ],
)  # fmt: skip
def test_a_schema_that_is_not_taken_is_named_by_where_the_client_has_it(of: Compiler, schema: Any, said: str) -> None:
    parts = [{"schema": NUMBER, "where": "[0]"}, {"schema": schema | {"required": ["a"]}, "where": "[1]"}]
    with pytest.raises(RequestError, match=said):
        matching(of, expression({"any": parts}))
