"""The forms in which calls are read here, by vLLM's names."""

from __future__ import annotations

from coserve_agent.text.marks import Marks
from coserve_agent.text.pieces import Pieces
from coserve_agent.tools import hermes, llama, mistral
from coserve_agent.tools.format import Format

MARKERS = (*hermes.MARKERS, *llama.MARKERS, *mistral.MARKERS)
NAMES = ("mistral", "hermes", "llama3_json")
"""In the order in which they are tried: the last has no marker."""


def format_of(name: str, marks: Marks, pieces: Pieces) -> Format:
    """The form `name` for a tokenizer."""
    if name == "hermes":
        return hermes.Hermes(marks)
    if name == "llama3_json":
        return llama.Llama(marks)
    return mistral.Mistral(marks, named=mistral.ARGS in pieces.added.values())
