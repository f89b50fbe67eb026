"""Which parameters a request may have, and a clear refusal for those that would change the answer but are not
supported.

A parameter that asks for nothing special (null, or the neutral value) is accepted, so that tools that send every field
of OpenAI's API work unchanged. Nothing is ignored silently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from coserve_agent.chat.message import without_nulls
from coserve_agent.http.errors import bad_request


def _neutral(*values: object) -> Callable[[object], bool]:
    # `is` for booleans: 1 == True would let logprobs=1 pass for True.
    return lambda value: any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in values)


def _anything(value: object) -> bool:
    return True


_EMPTY = _neutral([], {}, "")
_OFF = _neutral(False)

# What changes nothing at the given values. null is neutral everywhere.
NEUTRAL: Mapping[str, Callable[[object], bool]] = {
    # harmless: they concern OpenAI's own platform
    **dict.fromkeys(
        ("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
        _anything,
    ),
    "store": _anything,
    "parallel_tool_calls": _anything,
    "priority": _anything,
    "request_id": _anything,
    # they would change the answer
    "best_of": _neutral(1),
    "top_logprobs": _neutral(0),
    "echo": _OFF,
    "suffix": _EMPTY,
    "length_penalty": _neutral(1),
    "use_beam_search": _OFF,
    "tools": _EMPTY,
    "tool_choice": _neutral("none", "auto"),
    "functions": _EMPTY,
    "function_call": _neutral("none", "auto"),
    "modalities": _neutral(["text"]),
    "audio": _EMPTY,
    "prediction": _EMPTY,
    "reasoning_effort": _neutral("none"),
    "verbosity": _neutral("medium"),
    "web_search_options": _EMPTY,
    "skip_special_tokens": _neutral(True),
    "spaces_between_special_tokens": _neutral(True, False),
    "include_stop_str_in_output": _OFF,
    "add_special_tokens": _neutral(True),
    "add_generation_prompt": _neutral(True),
    "continue_final_message": _OFF,
    "chat_template": _EMPTY,
    "truncate_prompt_tokens": _EMPTY,
    "guided_grammar": _EMPTY,
    "guided_whitespace_pattern": _EMPTY,
    "guided_decoding_backend": _EMPTY,
    "structural_tag": _EMPTY,
}


def check_supported(body: Mapping[str, Any], known: frozenset[str]) -> dict[str, Any]:
    """`body` without the neutral parameters.

    Raises:
        ApiError: 400 naming the first parameter that is unknown or asks for something that is not supported.
    """
    kept = {}
    for name, value in body.items():
        if value is None:
            continue
        if name in known:
            kept[name] = value
        elif name not in NEUTRAL:
            raise bad_request(
                f"{name} is no parameter of this API; remove it (supported: {', '.join(sorted(known))})",
                name,
                "unknown_parameter",
            )
        elif not NEUTRAL[name](without_nulls(value)):
            raise bad_request(
                f"{name} is not supported here, and ignoring it would change the answer; remove it",
                name,
                "unsupported_parameter",
            )
    return kept
