"""A request's body as a JSON object that every later step can use: whole characters, whole numbers as whole numbers."""

from __future__ import annotations

import json
from typing import Any

from starlette.requests import Request

from coserve_agent import strict_json
from coserve_agent.http.errors import ApiError, bad_request


async def read_json(request: Request, max_bytes: int) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        ApiError: 413 if it is larger than `max_bytes`, 400 if it is no JSON object (RFC 8259: no NaN, no Infinity), or
            one of two meanings: a field twice in an object, half of a surrogate pair.
    """
    too_large = ApiError(413, f"the body is larger than {max_bytes} bytes; send less", code="body_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    return parse_json(bytes(body))


def parse_json(body: bytes) -> dict[str, Any]:
    """`body` as an object. JSON has one kind of number, so 16.0 is 16.

    Raises:
        ApiError: 400 as `read_json` says.
    """
    try:
        # Given bytes, json.loads would let encoded surrogates pass.
        text = body.decode(json.detect_encoding(body))
        data = strict_json.loads(text, number=strict_json.whole)
    except strict_json.FieldError as error:
        raise bad_request(str(error), error.name or None, "invalid_value") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(data, dict):
        raise ApiError(400, f"the body is a JSON {type(data).__name__}; send an object", code="invalid_json")
    return data
