"""The forms in which calls are read here, by their names."""

from __future__ import annotations

from coserve_agent.text.marks import Marks
from coserve_agent.text.pieces import Pieces
from coserve_agent.tools import hermes, llama, mistral
from coserve_agent.tools.format import Format
from coserve_api.endpoint import ToolCallParser

MARKERS = (*hermes.MARKERS, *llama.MARKERS, *mistral.MARKERS)
NAMES = (ToolCallParser.MISTRAL, ToolCallParser.HERMES, ToolCallParser.LLAMA3_JSON)
"""In the order in which they are tried: the last has no marker."""


def format_of(name: ToolCallParser, marks: Marks, pieces: Pieces) -> Format:
    """The form `name` for a tokenizer."""
    match name:
        case ToolCallParser.HERMES:
            return hermes.Hermes(marks)
        case ToolCallParser.LLAMA3_JSON:
            return llama.Llama(marks)
        case ToolCallParser.MISTRAL:
            return mistral.Mistral(marks, named=mistral.ARGS in pieces.added.values())
