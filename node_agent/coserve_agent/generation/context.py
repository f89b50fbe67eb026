"""What a client is told whose request does not fit the model's context.

OpenAI's own words and code: LiteLLM ("this model's maximum context length is") and LangChain
("context_length_exceeded") know by them that another model, or a shorter conversation, would help.
"""

from __future__ import annotations

from coserve_agent.http.errors import ApiError, bad_request

CODE = "context_length_exceeded"


def _limit(tokens: int) -> str:
    return f"This model's maximum context length is {tokens} tokens of prompt and answer together."


def prompt_too_long(prompt_tokens: int, limit: int, param: str) -> ApiError:
    """The prompt alone leaves no room for an answer; `param` holds it."""
    return bad_request(
        f"{_limit(limit)} However, your {param} resulted in {prompt_tokens} tokens; shorten {param} to "
        f"{limit - 1} tokens or less",
        param,
        CODE,
    )


def answer_too_long(prompt_tokens: int, max_tokens: int, limit: int) -> ApiError:
    """Prompt and answer together do not fit."""
    return bad_request(
        f"{_limit(limit)} However, you requested {prompt_tokens + max_tokens} tokens ({prompt_tokens} in the prompt, "
        f"{max_tokens} for the completion); shorten the prompt, or lower max_tokens to {limit - prompt_tokens} or less",
        "max_tokens",
        CODE,
    )
