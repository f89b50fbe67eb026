"""Answers under a grammar without a model: what may come next, and where each choice leads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from small_models import CONTEXT

from coserve_engine.errors import RequestError
from coserve_engine.grammar.compiler import Compiler
from coserve_engine.grammar.matching import Matching
from coserve_engine.layout.masks import words
from coserve_engine.messages import Grammar, GrammarKind
from coserve_engine.numerics import Numerics

END = 3
"""What ends an answer in the models of `small_models.write_tokenizer`."""
VOCAB = 320
ROOMY = {"max_model_length": CONTEXT, "kv_cache_bytes": 1 << 20, "numerics": Numerics(page=16)}
"""Of an engine for them."""


def schema(document: Any) -> Grammar:
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(document))


def regex(pattern: str) -> Grammar:
    return Grammar(GrammarKind.REGEX, pattern)


def choice(*texts: str) -> Grammar:
    return Grammar(GrammarKind.CHOICE, json.dumps(texts))


JSON_OBJECT = Grammar(GrammarKind.JSON_OBJECT)


def compiler(folder: Path, vocab: int = VOCAB, ends: tuple[int, ...] = (END,)) -> Compiler:
    return Compiler(folder, vocab, ends)


def matching(of: Compiler, grammar: Grammar, stops: Iterable[int] = ()) -> Matching:
    """Of an answer that has nothing yet.

    Raises:
        RequestError: the grammar cannot be compiled.
    """
    asked = of.ask(grammar)
    of._thread.submit(int).result()
    of.collect()
    if isinstance(asked.made, RequestError):
        raise asked.made
    assert asked.made is not None
    return Matching(asked.made.deep_copy(), of.end_tokens[0], {*stops, *of.end_tokens})


def allowed(of: Compiler, held: Matching, output: Sequence[int] = (), ends: Sequence[int] | None = None) -> set[int]:
    """Which tokens may follow."""
    bits = np.empty(words(of.vocab_size), np.int32)
    held.fill(bits, output, of.end_tokens if ends is None else ends)
    return set(np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist())
