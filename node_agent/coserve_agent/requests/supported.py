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

Neutral = Callable[[object], bool]
"""Whether a value changes nothing."""


def neutral(*values: object) -> Neutral:
    # `is` for booleans: 1 == True would let logprobs=1 pass for True.
    return lambda value: any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in values)


def anything(value: object) -> bool:
    return True


EMPTY = neutral([], {}, "")
OFF = neutral(False)

PLATFORM: Mapping[str, Neutral] = dict.fromkeys(
    ("user", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"), anything
)
"""Harmless: they concern OpenAI's own platform."""

# What changes nothing at the given values. null is neutral everywhere.
NEUTRAL: Mapping[str, Neutral] = {
    **PLATFORM,
    "metadata": anything,
    "store": anything,
    "parallel_tool_calls": anything,
    "priority": anything,
    "request_id": anything,
    # they would change the answer
    "best_of": neutral(1),
    "top_logprobs": neutral(0),
    "echo": OFF,
    "suffix": EMPTY,
    "length_penalty": neutral(1),
    "use_beam_search": OFF,
    "tools": EMPTY,
    "tool_choice": neutral("none", "auto"),
    "functions": EMPTY,
    "function_call": neutral("none", "auto"),
    "modalities": neutral(["text"]),
    "audio": EMPTY,
    "prediction": EMPTY,
    "reasoning_effort": neutral("none"),
    "verbosity": neutral("medium"),
    "web_search_options": EMPTY,
    "skip_special_tokens": neutral(True),
    "spaces_between_special_tokens": neutral(True, False),
    "include_stop_str_in_output": OFF,
    "add_special_tokens": neutral(True),
    "add_generation_prompt": neutral(True),
    "continue_final_message": OFF,
    "chat_template": EMPTY,
    "truncate_prompt_tokens": EMPTY,
    "guided_grammar": EMPTY,
    "guided_whitespace_pattern": EMPTY,
    "guided_decoding_backend": EMPTY,
    "structural_tag": EMPTY,
}

REMEDIES: Mapping[str, str] = {
    "functions": "use tools, which replaced it",
    "function_call": "use tool_choice, which replaced it",
}
"""For what is not just to be removed."""


def check_supported(
    body: Mapping[str, Any],
    known: frozenset[str],
    neutral: Mapping[str, Neutral] = NEUTRAL,
    remedies: Mapping[str, str] = REMEDIES,
) -> dict[str, Any]:
    """`body` without the `neutral` parameters.

    Raises:
        ApiError: 400 naming the first parameter that is unknown or asks for something that is not supported.
    """
    kept = {}
    for name, value in body.items():
        if value is None:
            continue
        if name in known:
            kept[name] = value
        elif name not in neutral:
            raise bad_request(
                f"{name} is no parameter of this API; remove it (supported: {', '.join(sorted(known))})",
                name,
                "unknown_parameter",
            )
        elif not neutral[name](without_nulls(value)):
            raise bad_request(
                f"{name} is not supported here, and ignoring it would change the answer; "
                f"{remedies.get(name, 'remove it')}",
                name,
                "unsupported_parameter",
            )
    return kept
