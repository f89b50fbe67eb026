"""Grammars that the server makes of a client's schemas: texts and tokens in a row, of which some may repeat.

The JSON of one is a text that stands as it is, or an object with one of: `token` (an id, and its `text`), `schema` (and
`where` the client has it), `all` (one behind the other), `any` (one of them), `several` (one or more, and what is
`between` two), `maybe` (none or one), `until` (any text, and this behind it).
"""

from __future__ import annotations

import json
from typing import Any

from coserve_engine.errors import RequestError
from coserve_engine.grammar.schema import Schema


class Expression:
    """Raises RequestError for a schema that is not taken."""

    def __init__(self, text: str) -> None:
        self.schemas: list[tuple[str, Schema]] = []
        """Each with where the client has it."""
        self._root = json.loads(text)
        self._read(self._root)

    def _read(self, part: Any) -> None:
        match part:
            case {"schema": schema, "where": where}:
                try:
                    self.schemas.append((where, Schema(json.dumps(schema))))
                except RequestError as error:
                    said = str(error).replace("grammar", f"grammar{where}", 1)
                    raise RequestError(error.code, said, error.field) from None
            case {"all": several} | {"any": several}:
                for one in several:
                    self._read(one)
            case {"several": one} | {"maybe": one} | {"until": one}:
                self._read(one)

    def rules(self, *, spelt: bool) -> str:
        """In llguidance's dialect of Lark, from what `start` is on: `s0` and so on are the schemas' names. Where it is
        `spelt` each token is its text, for a vocabulary that has none of them.
        """
        lark = _Lark(spelt)
        start = lark.written(self._root)
        return "\n".join([start, *lark.rules])


class _Lark:
    """One writing of an expression; `rules` are those that it needs of its own."""

    def __init__(self, spelt: bool) -> None:
        self._spelt = spelt
        self._schemas = 0
        self.rules: list[str] = []

    def written(self, part: Any) -> str:
        match part:
            case str():
                return json.dumps(part)
            case {"token": id, "text": text}:
                return json.dumps(text) if self._spelt else f"<[{id}]>"
            case {"schema": _}:
                self._schemas += 1
                return f"s{self._schemas - 1}"
            case {"all": several}:
                return "( " + " ".join(map(self.written, several)) + " )"
            case {"any": several}:
                return "( " + " | ".join(map(self.written, several)) + " )"
            case {"several": one, **more}:
                between = self.written(more["between"]) if "between" in more else ""
                name = self._rule("r", f": {self.written(one)}")
                return f"{name} ( {between} {name} )*"
            case {"maybe": one}:
                return f"( {self.written(one)} )?"
            case {"until": str(end)}:
                return self._until(end)
            case {"until": {"text": text} as token}:
                return self._until(text) if self._spelt else f"/(?s:.*)/ {self.written(token)}"
        raise TypeError(f"an expression has {part!r}")

    def _until(self, text: str) -> str:
        return self._rule("u", f"[suffix={json.dumps(text)}]: /(?s:.*)/")

    def _rule(self, kind: str, what: str) -> str:
        """The name of a rule of its own."""
        name = f"{kind}{len(self.rules)}"
        self.rules.append(name + what)
        return name
