"""A grammar as llguidance reads it.

All are written in its dialect of Lark with `no_forcing`: it would otherwise allow one way alone to spell what has to
come next, which takes a tokenizer, and milliseconds where the rest takes microseconds. The model decides how it spells.
"""

from __future__ import annotations

import json
from typing import Any

import llguidance

from coserve_engine.errors import RequestError
from coserve_engine.grammar.expression import Expression
from coserve_engine.grammar.schema import Schema
from coserve_engine.messages import Grammar, GrammarKind

MOST_BYTES = 1 << 18
"""Of a grammar's text."""
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"
"""Between two parts of a JSON text. A model that is in doubt may write white space to no end, which is valid JSON."""
_HEAD = '%llguidance {"no_forcing": true}\nstart: '


def source(grammar: Grammar, *, spelt: bool = False) -> str:
    """Its text for llguidance; of a schema see `schema_source`. `spelt`: tokens are written as their texts.

    Raises:
        RequestError: it is too long or no text, or is not what its kind says.
    """
    try:
        length = len(grammar.text.encode())
    except UnicodeEncodeError:
        raise refused("has half of a surrogate pair, which is no character") from None
    if length > MOST_BYTES:
        raise refused(f"has {length:,} bytes; {MOST_BYTES:,} at most are taken")
    match grammar.kind:
        case GrammarKind.JSON_OBJECT:
            return schema_source({"type": "object"}, exclusive=True)
        case GrammarKind.JSON_SCHEMA:
            schema = Schema(grammar.text)
            return schema_source(schema.document(), exclusive=schema.exclusive)
        case GrammarKind.REGEX:
            if (len(grammar.text) - len(grammar.text.rstrip("\\"))) % 2:  # llguidance leaves it out
                raise refused("ends with a backslash that escapes nothing")
            return f"{_HEAD}/{llguidance.regex_to_lark(grammar.text)}/"
        case GrammarKind.CHOICE:
            return _HEAD + " | ".join(json.dumps(one) for one in _choices(grammar.text))
        case GrammarKind.EXPRESSION:
            expression = Expression(grammar.text)
            schemas = [schema for _, schema in expression.schemas]
            rules = [f"s{n}: {_json(one.document(), exclusive=one.exclusive)}" for n, one in enumerate(schemas)]
            return "\n".join([_HEAD + expression.rules(spelt=spelt), *rules])


def schema_source(document: dict[str, Any], *, exclusive: bool) -> str:
    """A schema's text for llguidance; `exclusive` as `Schema` says it."""
    return _HEAD + _json(document, exclusive=exclusive)


def _json(document: dict[str, Any], *, exclusive: bool) -> str:
    options = {"whitespace_pattern": WHITESPACE, "coerce_one_of": exclusive}
    return f"%json {json.dumps(document | {'x-guidance': options})}"


def refused(what: str, where: str = "") -> RequestError:
    """Of a grammar, or its part where the client has `where`."""
    return RequestError("invalid_parameter", f"grammar{where} {what}", "grammar")


def _choices(text: str) -> list[str]:
    try:
        choices = json.loads(text)
    except (ValueError, RecursionError):
        choices = None
    if not isinstance(choices, list) or not choices or not all(isinstance(one, str) for one in choices):
        raise refused("must be a JSON array of strings, with one at least, where its kind is choice")
    return list(dict.fromkeys(choices))
