"""Whether the model is to think, as far as its chat template lets a client say so."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StrictInt

from coserve_agent.chat.message import StrictModel
from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.http.errors import bad_request
from coserve_agent.tools.answer_format import AnswerFormat

_VARIABLES = ("enable_thinking", "thinking")
"""Of chat templates, which switch it: Qwen's and DeepSeek's names."""


class ThinkingOptions(StrictModel):
    """How long it thinks is the model's own affair: `budget_tokens` is no bound here, max_tokens is."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: Annotated[StrictInt, Field(ge=0)] | None = None
    display: Literal["summarized"] | None = None


def thinking_variables(wanted: ThinkingOptions | None, tokenizer: Tokenizer, known: AnswerFormat) -> dict[str, Any]:
    """The template's variable that says what is wanted; none where nothing is, or there is none to set.

    Raises:
        ApiError: 400 for a model that cannot be kept from thinking.
    """
    if wanted is None:
        return {}
    variable = next((name for name in _VARIABLES if name in tokenizer.template_variables), None)
    if variable is not None:
        return {variable: wanted.type != "disabled"}
    if wanted.type == "disabled" and known.tags is not None:
        raise bad_request(
            "thinking is 'disabled', but this model's chat template has no variable that would switch it off; leave "
            "thinking out, or use another model",
            "thinking",
            "unsupported_parameter",
        )
    return {}
