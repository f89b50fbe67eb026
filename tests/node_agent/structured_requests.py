"""What tests ask for as structured output."""

from __future__ import annotations

from typing import Any

CHAT = [{"role": "user", "content": "the quick brown fox"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Zürich", "北京", 'a "b"\\', "tab\t"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 20_000_000_000},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 2},
        "nested": {"$ref": "#/$defs/nested"},
    },
    "required": ["city", "count", "tags", "nested"],
    "additionalProperties": False,
    "$defs": {
        "nested": {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
        | {"additionalProperties": False}
    },
}


def json_schema(schema: Any = SCHEMA, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "place", "schema": schema, **more}}
