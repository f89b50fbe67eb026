"""Which JSON Schemas are taken: every keyword is enforced or refused by its path, none is left out in silence.

What goes on to the compiler is a copy that holds nothing but what was looked at here: annotations are left out, and no
`x-guidance` of a client's turns the checks off. How deep a schema goes is bounded with its references followed, since
the compiler recurses so: a chain of some thousand definitions would overflow its stack, and that ends the process.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any, NoReturn
from urllib.parse import quote, unquote

from coserve_engine.errors import RequestError

MOST_DEPTH = 100
FORMATS = ("date", "date-time", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
ANNOTATIONS = (
    *("$schema", "$comment", "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"),
    *("contentMediaType", "contentEncoding", "discriminator"),
)
"""They say what a value means, not whether it is valid; so do OpenAPI's `x-`. `discriminator` is OpenAPI's too, and
stands beside a oneOf that says the same.
"""
ROOT = "#/$defs/root"

Place = tuple[str, ...]
"""Of a schema in its document: keys and indices from the root."""


class Schema:
    """A JSON Schema that was checked.

    Raises:
        RequestError: it is none, is too deep, or has what is not supported; the message has the path.
    """

    def __init__(self, text: str) -> None:
        self._found = set[Place]()
        self._below: defaultdict[Place, list[tuple[Place, bool]]] = defaultdict(list)
        """What the compiler goes to from a place, in its order, and whether by a reference."""
        self._unions: list[list[Any]] = []
        self._copy = self._checked(_parsed(text), ())
        self._met = set[Place]()
        self._follow((), 0)
        self.exclusive = all(map(self._told_apart, self._unions))
        """Whether no value is valid by two schemas of a oneOf: each then means what anyOf does."""

    @property
    def places(self) -> list[Place]:
        """Of the schemas in it, the deepest first."""
        return sorted(self._found, key=lambda place: (-len(place), place))

    def document(self, place: Place = ()) -> dict[str, Any]:
        """The schema at a place as a document of its own."""
        return {"$defs": {"root": self._copy}, "$ref": ROOT + _pointer(place)}

    def _checked(self, schema: Any, place: Place, above: Place | None = None) -> Any:
        """A copy; the compiler comes there from `above`."""
        if isinstance(schema, bool) and place:
            return schema
        if not isinstance(schema, dict):
            refuse(place, "is no JSON object; a schema is one")
        if len(place) > MOST_DEPTH:
            refuse(place, f"is more than {MOST_DEPTH} levels deep; make the schema flatter")
        self._found.add(place)
        if above is not None:
            self._below[above].append((place, False))
        return {
            keyword: self._value(keyword, value, schema, place)
            for keyword, value in schema.items()
            if not (keyword in ANNOTATIONS or _of_openapi(keyword) or (keyword == "$id" and not place))
        }

    def _value(self, keyword: str, value: Any, schema: dict[str, Any], place: Place) -> Any:
        """A keyword's value, checked; a copy where schemas are in it."""
        here = (*place, keyword)
        match keyword:
            case "items" | "additionalProperties":
                if isinstance(value, list):
                    refuse(here, "is an array; write one schema, and prefixItems for the first items")
                return self._checked(value, here, place)
            case "anyOf" | "oneOf" | "allOf" | "prefixItems":
                if not isinstance(value, list) or not value:
                    refuse(here, "must be an array of schemas, with one at least")
                copies = [self._checked(one, (*here, str(n)), place) for n, one in enumerate(value)]
                if keyword == "oneOf":
                    self._unions.append(copies)
                return copies
            case "properties" | "patternProperties":
                _check_object(value, here)
                return {name: self._checked(one, (*here, name), place) for name, one in value.items()}
            case "$defs" | "definitions":
                _check_object(value, here)
                return {name: self._checked(one, (*here, name)) for name, one in value.items()}
            case "$ref":
                return self._reference(value, place, here)
        check = _CHECKS.get(keyword)
        if check is None:
            refuse(here, "is a keyword that is not supported; leave it out")
        wrong = check(value)
        if wrong:
            refuse(here, wrong)
        if keyword == "minProperties" and value > len(set(schema.get("required", ()))):
            refuse(here, f"is {value}, and only names in required are sure to differ; name as many there")
        return value

    def _told_apart(self, schemas: list[Any]) -> bool:
        """Whether all are objects with one name whose texts differ, as pydantic writes a union with a discriminator.
        The compiler sees that of schemas that stand there, but not of references.
        """
        tags: defaultdict[str, list[str]] = defaultdict(list)
        for schema in map(self._referred, schemas):
            if not isinstance(schema, dict) or schema.get("type") != "object":
                return False
            properties = schema.get("properties", {})
            for name in properties.keys() & set(schema.get("required", ())):
                tag = properties[name].get("const") if isinstance(properties[name], dict) else None
                if isinstance(tag, str):
                    tags[name].append(tag)
        return any(len(set(texts)) == len(texts) == len(schemas) for texts in tags.values())

    def _referred(self, schema: Any) -> Any:
        """What a schema refers to, itself where it does not; None where no schema is."""
        if not isinstance(schema, dict) or "$ref" not in schema:
            return schema
        place = _target("#" + schema["$ref"].removeprefix(ROOT))
        found: Any = self._copy if place in self._found else None
        for part in place if found is not None else ():
            found = found[int(part)] if isinstance(found, list) else found[part]
        return found

    def _reference(self, value: Any, place: Place, here: Place) -> str:
        if not isinstance(value, str) or not (value == "#" or value.startswith("#/")):
            refuse(here, f'is {value!r}; it must refer to a schema of this document, as in "#/$defs/name"')
        target = _target(value)
        self._below[place].append((target, True))
        return ROOT + _pointer(target)

    def _follow(self, place: Place, depth: int) -> None:
        """To wherever the compiler goes, which meets each reference once."""
        if depth > MOST_DEPTH:
            refuse(place, f"is more than {MOST_DEPTH} levels deep by references; make the schema flatter")
        for below, referred in self._below[place]:
            if referred and below not in self._found:
                refuse((*place, "$ref"), f"refers to {shown(below)}, where no schema is; refer to one of this document")
            if not referred or below not in self._met:
                if referred:
                    self._met.add(below)
                self._follow(below, depth + 1)


def shown(place: Place) -> str:
    """A place as a JSON pointer."""
    return "#" + _pointer(place)


def refuse(place: Place, what: str) -> NoReturn:
    raise RequestError("invalid_parameter", f"grammar: the schema's {shown(place)} {what}", "grammar")


def _target(reference: str) -> Place:
    parts = unquote(reference[2:]).split("/") if reference != "#" else []
    return tuple(part.replace("~1", "/").replace("~0", "~") for part in parts)


def _pointer(place: Place) -> str:
    return "".join("/" + quote(part.replace("~", "~0").replace("/", "~1"), safe="~$") for part in place)


def _parsed(text: str) -> Any:
    """A JSON text in which nothing is said twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{twice!r} stands twice in one object")
        return found

    def no_number(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=no_number)
    except ValueError as error:
        said = str(error)
    except RecursionError:
        said = "it is too deep"
    raise RequestError("invalid_parameter", f"grammar: the schema cannot be read ({said}); send JSON", "grammar")


def _of_openapi(keyword: str) -> bool:
    return keyword.startswith("x-") and keyword != "x-guidance"


# ---- what values a keyword has: what is wrong, or nothing ----


def _check_object(value: Any, here: Place) -> None:
    if not isinstance(value, dict):
        refuse(here, "must be an object of schemas")


def _type(value: Any) -> str:
    several = value if isinstance(value, list) else [value]
    known = several and all(isinstance(one, str) and one in TYPES for one in several)
    return "" if known else f"is {value!r}; it must be of {', '.join(TYPES)}"


def _values(value: Any) -> str:
    return "" if isinstance(value, list) and value else "must be an array of values, with one at least"


def _names(value: Any) -> str:
    fine = isinstance(value, list) and all(isinstance(one, str) for one in value)
    return "" if fine else "must be an array of names"


def _pattern(value: Any) -> str:
    return "" if isinstance(value, str) else "must be a regular expression"


def _format(value: Any) -> str:
    return "" if value in FORMATS else f"is {value!r}; the formats that are enforced are {', '.join(FORMATS)}"


def _count(value: Any) -> str:
    fine = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return "" if fine else "must be a count, 0 or more"


def _number(value: Any) -> str:
    return "" if isinstance(value, int | float) and not isinstance(value, bool) else "must be a number"


_CHECKS = {
    "const": lambda value: "",
    "enum": _values,
    "type": _type,
    "required": _names,
    "pattern": _pattern,
    "format": _format,
    **dict.fromkeys(("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"), _count),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"), _number),
}
