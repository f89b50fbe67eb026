"""How the answer to a chat request is read, and what it is held to: by the tools that it offers, and by how the model
writes calls and thoughts.
"""

from __future__ import annotations

from collections.abc import Sequence

from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.chat.turns import block_tags, opened
from coserve_agent.http.errors import bad_request
from coserve_agent.requests.chat import ChatRequest
from coserve_agent.requests.structured import Structure, structure_of
from coserve_agent.requests.tools import NamedTool
from coserve_agent.tools.answer_format import AnswerFormat
from coserve_agent.tools.formats import NAMES
from coserve_agent.tools.grammar import arguments_schema, calls_grammar
from coserve_agent.tools.reading import PLAIN, Reading
from coserve_agent.tools.thought_parser import Tags

_TAIL = 64
"""Tokens at the end of a prompt, where it may open a think block."""


def check_offer(request: ChatRequest, known: AnswerFormat) -> None:
    """Raises ApiError 400 for tools that the model cannot be shown, or whose calls could not be read."""
    if not request.tools:
        return
    if not known.shows_tools:
        raise bad_request(
            "tools are not written by this model's chat template, so that it would not see them; use a model whose "
            "template writes them, or describe them in a message and remove tools",
            "tools",
            "unsupported_parameter",
        )
    if request.wants_calls and known.format is None:
        raise bad_request(
            "tools: this model's chat template writes calls in no form that is read here (those are "
            f"{', '.join(sorted(NAMES))}); set the endpoint's engine.toolCallParser to one of them if the model's "
            "answers have it, set tool_choice to 'none', or remove tools",
            "tools",
            "unsupported_parameter",
        )
    if request.wants_calls and (structure := structure_of(request)) is not None:
        raise bad_request(
            f"{structure.field} says what the answer is, and with tools it may be a call; remove one of them, or set "
            "tool_choice to 'none'",
            structure.param,
            "unsupported_parameter",
        )


def reading_of(
    request: ChatRequest, known: AnswerFormat, tokenizer: Tokenizer, prompt: Sequence[int]
) -> tuple[Reading, Structure | None]:
    """How the answer behind `prompt` is read, and what it is held to, by the client's own word or by the tools.

    One that is held to a form of the client's is all content: the form begins with its first token.

    Raises:
        ApiError: 400, as `structure_of`.
    """
    structure = structure_of(request)
    if structure is not None:
        return PLAIN, structure
    tail = tokenizer.decode(prompt[-_TAIL:], skip_special_tokens=False)
    block = opened(tail)
    tags = known.tags if block is None else Tags(*block_tags(block))
    if not request.wants_calls or known.format is None:
        return (PLAIN if tags is None else Reading(known.marks, tags=tags, thinking=block is not None)), None
    single = request.parallel_tool_calls is False or isinstance(request.tool_choice, NamedTool)
    reading = Reading(
        known.marks,
        known.format,
        frozenset(request.callable),
        held=request.must_call,
        most_calls=1 if single else None,
        tags=tags,
        thinking=block is not None,
    )
    if not request.must_call:
        return reading, None
    tools = request.tools or []
    functions = {
        name: (f"[{n}].function.parameters", arguments_schema(tools[n].function.parameters))
        for name, n in request.callable.items()
    }
    thought = None if tags is not None and tail.rstrip().endswith(tags.closing) else tags
    grammar = calls_grammar(
        known.format, functions, tokenizer.pieces, several=not single, tags=thought, thinking=block is not None
    )
    return reading, Structure("tools", grammar)
