"""Grammars from text to matchers, in a thread, so that no iteration waits for one.

What was compiled is kept, the newest used last to go; whoever asks for the same grammar meanwhile gets the same. What a
request holds is a copy: its place in the grammar is its own.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import llguidance

from coserve_engine.errors import ModelFolderError, RequestError
from coserve_engine.grammar.expression import Expression
from coserve_engine.grammar.sandbox import SECONDS, Sandbox
from coserve_engine.grammar.schema import ROOT, Schema, shown
from coserve_engine.grammar.source import refused, schema_source, source
from coserve_engine.grammar.vocabulary import read_vocabulary
from coserve_engine.messages import Grammar, GrammarKind

KEPT = 64
"""Grammars, of some 100 KB each."""
MOST_COMPILING = 64
MOST_BLAMED = 200
"""Parts of a schema that are tried alone to find the one at fault."""
LIMITS = llguidance.LLParserLimits(step_lexer_fuel=100_000, max_lexer_states=20_000, verbose_errors=False)
"""Of one mask: 7 ms of the lexer at most; of one answer: 40 MB of its states."""


@dataclass(slots=True)
class Compilation:
    """Of one grammar, for all who asked for it; `made` once it is over: its matcher, to be copied, or what is wrong."""

    grammar: Grammar
    future: Future[llguidance.LLMatcher]
    wanted: int = 0
    made: llguidance.LLMatcher | RequestError | None = None


class Compiler:
    """Of one model: a folder, so many tokens, and those that end an answer."""

    def __init__(self, folder: Path, vocab_size: int, end_tokens: tuple[int, ...]) -> None:
        self._folder, self.vocab_size = folder, vocab_size
        self.end_tokens = tuple(token for token in end_tokens if 0 <= token < vocab_size)
        self._thread = ThreadPoolExecutor(1, "grammars")
        self._sandbox = Sandbox()
        self._running: dict[Grammar, Compilation] = {}
        self._kept: OrderedDict[Grammar, Compilation] = OrderedDict()

    def prepare(self) -> str:
        """Make the vocabulary's trie, which keeps the interpreter for up to some seconds; a line for the log."""
        if isinstance(self._trie, RequestError):
            return str(self._trie)
        return f"answers can be held to a grammar over {self._trie.vocab_size} tokens"

    def ask(self, grammar: Grammar) -> Compilation:
        """Have a grammar compiled, or take what is known of it.

        Raises:
            RequestError: too many others are being compiled.
        """
        found = self._kept.get(grammar) or self._running.get(grammar)
        if found is None:
            if len(self._running) >= MOST_COMPILING:
                raise RequestError("overloaded", f"{MOST_COMPILING} grammars are being compiled; try again later")
            found = self._running[grammar] = Compilation(grammar, self._thread.submit(self._compile, grammar))
        elif found.made is not None:
            self._kept.move_to_end(grammar)
        found.wanted += 1
        return found

    def withdraw(self, compilation: Compilation) -> None:
        """One less wants it; what nobody wants is not begun."""
        compilation.wanted -= 1
        if not compilation.wanted and compilation.made is None and compilation.future.cancel():
            del self._running[compilation.grammar]

    def collect(self) -> None:
        """Say of each that is over what was made.

        Raises:
            Exception: compiling failed in a way that no grammar is to blame for.
        """
        for compilation in [one for one in self._running.values() if one.future.done()]:
            del self._running[compilation.grammar]
            try:
                compilation.made = compilation.future.result()
            except RequestError as error:
                compilation.made = error
            else:
                self._kept[compilation.grammar] = compilation
                if len(self._kept) > KEPT:
                    self._kept.popitem(last=False)

    # ---- in the thread ----

    @cached_property
    def _trie(self) -> llguidance.LLTokenizer | RequestError:
        """Or why there is none."""
        if not self.end_tokens:
            return refused("cannot be held to: this model has no token that ends an answer (eos_token_id)")
        try:
            vocabulary = read_vocabulary(self._folder, self.vocab_size)
            special = sorted({*vocabulary.special, *self.end_tokens})
            tokens = _Tokens(vocabulary.tokens, special, self.end_tokens[0])
            return llguidance.LLTokenizer(llguidance.TokenizerWrapper(tokens))
        except (ModelFolderError, ValueError) as error:
            return refused(f"cannot be held to: {error}")

    def _compile(self, grammar: Grammar) -> llguidance.LLMatcher:
        if isinstance(self._trie, RequestError):
            raise self._trie
        text = source(grammar)
        wrong = self._sandbox.wrong(source(grammar, spelt=True) if grammar.kind is GrammarKind.EXPRESSION else text)
        if not wrong:
            matcher = llguidance.LLMatcher(self._trie, text, log_level=0, limits=LIMITS)
            tried = matcher.deep_copy()
            if not tried.is_error():
                tried.compute_bitmask()
            wrong = tried.get_error()
            if not wrong:
                return matcher
        raise self._blamed(grammar, wrong)

    def _blamed(self, grammar: Grammar, wrong: str) -> RequestError:
        """What is said of a grammar that cannot be compiled; of a schema by the path of its deepest part that alone
        cannot be either.
        """
        if grammar.kind is GrammarKind.JSON_SCHEMA:
            schemas = [("", Schema(grammar.text))]
        elif grammar.kind is GrammarKind.EXPRESSION:
            schemas = Expression(grammar.text).schemas
        else:
            return refused(f"cannot be compiled: {_said(wrong)}")
        until = time.monotonic() + SECONDS
        for where, schema in schemas:
            for place in schema.places[:MOST_BLAMED]:
                alone = self._sandbox.wrong(schema_source(schema.document(place), exclusive=schema.exclusive))
                if alone:
                    return refused(f"cannot be compiled: the schema's {shown(place)}: {_said(alone)}", where)
                if time.monotonic() > until:
                    break
        return refused(f"cannot be compiled: the schema's #: {_said(wrong)}")


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A vocabulary as llguidance takes it."""

    tokens: list[bytes]
    special_token_ids: list[int]
    eos_token_id: int
    bos_token_id: int | None = None

    def __call__(self, text: object) -> list[int]:
        raise NotImplementedError("no grammar forces tokens: each is compiled with no_forcing")


_WHERE = "failed to compile JSON schema: "


def _said(wrong: str) -> str:
    """llguidance's message without the place in the text that we made of the grammar, in one line."""
    line = wrong.strip().partition("\n")[0]
    if line.startswith("NoExtension"):
        return "nothing can be that"
    if line.endswith("approximate oneOf with anyOf"):
        return "oneOf has schemas that cannot be told apart; give each a required name with a const, or use anyOf"
    if _WHERE in line:
        line = line.partition(_WHERE)[2]
    return line.replace(f"json-schema:///{ROOT}", "#")[:300]
