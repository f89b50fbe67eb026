"""What a client is told of a request that the engine refuses."""

from __future__ import annotations

from coserve_agent.engine.client import RefusedError
from coserve_agent.http.errors import ApiError, bad_request
from coserve_agent.requests.structured import Structure

RETRY_AFTER_S = 1
GRAMMAR = "grammar"
"""The engine's word for what clients say in several fields; its messages begin with it."""


def refusal(error: RefusedError, structure: Structure | None) -> ApiError:
    """By the engine's code; `structure` is what the answer was to be."""
    if error.code == "unknown_adapter":
        return ApiError(404, str(error), param="model", code="model_not_found")
    if error.code == "context_length_exceeded":
        return bad_request(str(error), "messages", error.code)
    if error.code == "invalid_token":
        return bad_request(str(error), "prompt", error.code)
    if error.code == "invalid_parameter" and error.field == GRAMMAR and structure is not None:
        return bad_request(structure.field + str(error).removeprefix(GRAMMAR), structure.param, "invalid_value")
    if error.code == "invalid_parameter":
        return bad_request(str(error), error.field, "invalid_value")
    if error.code == "overloaded":
        return ApiError(429, str(error), code=error.code, retry_after_s=RETRY_AFTER_S)
    if error.code == "draining":
        return ApiError(503, str(error), code=error.code, retry_after_s=RETRY_AFTER_S)
    return ApiError(500, f"the engine could not run the request: {error}", code=error.code)
