"""The response as an object: what was asked, echoed, and what came of it so far."""

from __future__ import annotations

import time
from typing import Any

from coserve_agent.generation.single import Usage
from coserve_agent.http.errors import ApiError
from coserve_agent.model.generation_config import SamplingDefaults
from coserve_agent.responses.request import FunctionTool, ResponsesRequest


class Body:
    """Of one request. `defaults` hold for what it does not say."""

    def __init__(self, name: str, request: ResponsesRequest, defaults: SamplingDefaults) -> None:
        self._created_s = int(time.time())
        form = request.text and request.text.format
        choice = request.tool_choice
        temperature, top_p = request.temperature, request.top_p
        self._asked: dict[str, Any] = {
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": request.model,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": defaults.temperature if temperature is None else temperature,
            "text": {"format": form.model_dump(exclude_unset=True, by_alias=True) if form else {"type": "text"}},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump() if choice else "auto",
            "tools": [_shown(tool) for tool in request.tools or ()],
            "top_p": defaults.top_p if top_p is None else top_p,
            "truncation": "disabled",
        }
        self._head = {"id": f"resp_{name}", "object": "response", "created_at": self._created_s}

    def written(
        self,
        status: str,
        output: list[dict[str, Any]],
        usage: Usage | None = None,
        *,
        incomplete: str | None = None,
        error: ApiError | None = None,
    ) -> dict[str, Any]:
        """As it stands at `status`; `incomplete` says why it is cut."""
        failed = None if error is None else {"code": "server_error", "message": error.message}
        return {
            **self._head,
            "status": status,
            "background": False,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": failed,
            "incomplete_details": None if incomplete is None else {"reason": incomplete},
            "output": output,
            "usage": None if usage is None else _usage(usage),
            **self._asked,
        }


def _shown(tool: FunctionTool) -> dict[str, Any]:
    return tool.model_dump(include={"type", "name", "description", "parameters", "strict"})


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.thought},
        "total_tokens": usage.prompt + usage.completion,
    }
