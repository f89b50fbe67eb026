"""Variables of a chat template, such as enable_thinking: who may set which, and whose value holds.

A request's value comes first, then the adapter's (those that it was trained with lie in its folder), then the
endpoint's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coserve_agent import strict_json
from coserve_agent.chat.template import ChatTemplateError, Given, Message
from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.errors import AgentError
from coserve_api.common import variables_fault
from coserve_engine.formats.opened import read_text

FILE = "rendering.json"
"""In an adapter's folder: how its prompts were written."""


class TemplateVariableError(AgentError):
    """A variable that cannot be set; the message names it and the remedy."""


def check_variables(tokenizer: Tokenizer, given: Mapping[str, Any], where: str) -> None:
    """Refuse variables that the chat template does not read (they would change nothing, or something of ours), and
    more of them than their bounds allow.

    Raises:
        TemplateVariableError: names the variable in the field `where`.
    """
    fault = variables_fault(given)
    if fault:
        raise TemplateVariableError(f"{where} {fault}")
    read = tokenizer.template_variables
    unknown = next((name for name in given if name not in read), None)
    if unknown is not None:
        known = f"it reads {', '.join(sorted(read))}" if read else "it reads none"
        raise TemplateVariableError(
            f"{where} has {unknown[:80]!r}, which the model's chat template does not read: {known}"
        )


def try_variables(tokenizer: Tokenizer, given: Mapping[str, Any], where: str, messages: Sequence[Message]) -> None:
    """Find values that the chat template cannot take: with them it fails, and without them it writes the messages.

    Raises:
        TemplateVariableError: names the field `where`, and what the template says.
    """
    if not given:
        return
    try:
        tokenizer.render(messages, Given(variables=given), add_generation_prompt=True)
    except ChatTemplateError as error:
        try:
            tokenizer.render(messages, add_generation_prompt=True)
        except ChatTemplateError:
            return
        raise TemplateVariableError(
            f"{where} has values with which the chat template fails ({error}); correct {', '.join(sorted(given))[:200]}"
        ) from None


def together(tokenizer: Tokenizer, served: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A request's variables `given` before those that its model is `served` with, as far as the template reads them."""
    return {name: value for name, value in served.items() if name in tokenizer.template_variables} | dict(given)


def rendering_file(variables: Mapping[str, Any], digest: str) -> str:
    """What an adapter's folder says: the variables, and the digest of tokenizer and chat template."""
    return json.dumps({"template_variables": dict(variables), "tokenizer_sha256": digest}, indent=1) + "\n"


def variables_of(folder: Path) -> dict[str, Any]:
    """Those of the adapter in `folder`; none where it does not say (it may be from elsewhere)."""
    try:
        content = strict_json.loads(read_text(folder, FILE))
    except (OSError, ValueError, RecursionError):
        return {}
    variables = content.get("template_variables") if isinstance(content, dict) else None
    return variables if isinstance(variables, dict) else {}
