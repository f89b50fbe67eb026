"""Grammars are compiled within bounds, once, and what cannot be is said of the grammar and by its path."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import grammars
import pytest
from grammars import choice, compiler, matching, regex, schema
from small_models import PLAIN_TEMPLATE, write_tokenizer

from coserve_engine.errors import RequestError
from coserve_engine.grammar import compiler as compiling
from coserve_engine.grammar.compiler import KEPT, MOST_COMPILING, Compiler
from coserve_engine.grammar.sandbox import Sandbox
from coserve_engine.grammar.source import MOST_BYTES, schema_source
from coserve_engine.messages import Grammar, GrammarKind

TEXT = {"type": "string"}
BELOW = {"type": "integer", "minimum": 5, "maximum": 3}


def refusal(of: Compiler, grammar: Grammar) -> str:
    with pytest.raises(RequestError) as error:
        matching(of, grammar)
    assert (error.value.code, error.value.field) == ("invalid_parameter", "grammar")
    return str(error.value)


# ---- bounds ----


def doubling(levels: int) -> dict[str, Any]:
    """Small, and no deeper than it looks, but twice as large with each level once its references are put in."""
    below = {n: {"$ref": f"#/$defs/l{n + 1}", "type": "object"} for n in range(levels)}
    links = {f"l{n}": {"type": "object", "properties": {"a": below[n], "b": below[n]}} for n in range(levels)}
    return {"$ref": "#/$defs/l0", "type": "object", "$defs": {**links, f"l{levels}": {"type": "object"}}}


def chain(links: int) -> dict[str, Any]:
    several = {f"l{n}": {"items": {"$ref": f"#/$defs/l{n + 1}"}} for n in range(links)}
    return {"$ref": "#/$defs/l0", "$defs": {**several, f"l{links}": TEXT}}


def test_a_grammar_that_takes_too_long_is_given_up_and_nothing_is_left_of_it(of: Compiler) -> None:
    of._sandbox = sandbox = Sandbox(seconds=0.5)
    assert not sandbox.wrong(schema_source(TEXT, exclusive=True))
    process = sandbox.pid
    assert process is not None
    assert "longer than 0.5 s to compile" in refusal(of, schema(doubling(24)))
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    matching(of, schema(TEXT))
    assert sandbox.pid not in (None, process)


def test_a_grammar_that_overflows_the_compilers_stack_ends_no_engine() -> None:
    """What bounds a schema's depth is taken away: this would end a process that compiled it."""
    sandbox = Sandbox()
    with pytest.raises(RequestError, match="more memory, or is deeper"):
        sandbox.wrong(schema_source(chain(5000), exclusive=True))
    assert not sandbox.wrong(schema_source(TEXT, exclusive=True))


def test_a_process_that_was_killed_meanwhile_is_no_grammars_fault() -> None:
    sandbox = Sandbox()
    sandbox.wrong(schema_source(TEXT, exclusive=True))
    process = sandbox._process
    assert process is not None
    process.kill()
    process.wait()
    assert not sandbox.wrong(schema_source(TEXT, exclusive=True))


def test_depths_that_are_taken_can_be_compiled(of: Compiler) -> None:
    matching(of, schema(chain(48)))


def test_a_grammar_has_so_many_bytes(of: Compiler) -> None:
    assert f"{MOST_BYTES:,} at most" in refusal(of, choice("é" * (MOST_BYTES // 2)))


def test_so_many_grammars_wait_to_be_compiled(of: Compiler) -> None:
    for n in range(MOST_COMPILING):
        of.ask(regex(f"a{n}"))
    of.ask(regex("a0"))
    with pytest.raises(RequestError) as error:
        of.ask(regex("b"))
    assert error.value.code == "overloaded"


# ---- once ----


def test_a_grammar_is_compiled_once_for_all_who_ask(of: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Grammar] = []
    real = Compiler._compile
    monkeypatch.setattr(Compiler, "_compile", lambda self, grammar: (seen.append(grammar), real(self, grammar))[1])
    first, second = of.ask(regex("ab")), of.ask(regex("ab"))
    held = matching(of, regex("ab"))
    assert first is second is of.ask(regex("ab"))
    assert seen == [regex("ab")]
    a = grammars.allowed(of, held)
    assert grammars.allowed(of, matching(of, regex("ab")), [min(a)]) != a
    assert grammars.allowed(of, held) == a, "each has a place of its own"


def test_those_that_were_used_last_are_kept(of: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "KEPT", 2)
    for pattern in ("a", "b", "a", "c"):
        matching(of, regex(pattern))
    assert [one.text for one in of._kept] == ["a", "c"]
    assert KEPT > 2


def test_a_grammar_that_nobody_waits_for_is_not_begun(of: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Compiler, "_compile", lambda self, grammar: pytest.fail("it was begun"))
    gate = threading.Event()
    busy = of._thread.submit(gate.wait)
    first, second = of.ask(regex("x")), of.ask(regex("x"))
    of.withdraw(first)
    assert of._running
    of.withdraw(second)
    assert not of._running
    gate.set()
    assert busy.result()


# ---- what is said ----


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (
            {"type": "object", "properties": {"a": BELOW}, "required": ["a"]},
            "#/properties/a: Unsatisfiable schema: minimum (5)",
        ),
        ({"items": {"type": "string", "pattern": "(?=a)b"}}, "#/items: regex parse error"),
        ({"items": {"type": "string", "pattern": "\\bfoo"}}, "#/items: lookarounds not supported"),
        ({"items": {"oneOf": [{"minimum": 1}, {"maximum": 3}]}}, "#/items: oneOf"),
        (
            {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {"type": "object"}]}}, "$ref": "#/$defs/a"},
            "#/$defs/a/allOf/0: ",
        ),
        ({"$ref": "#"}, "#: nothing can be that"),
        ({"anyOf": [False]}, "#"),
        ({"type": "integer", "minimum": 10**400}, "#"),
    ],
)
def test_a_schema_that_cannot_be_compiled_is_refused_by_its_path(of: Compiler, document: Any, said: str) -> None:
    assert f"cannot be compiled: the schema's {said}" in refusal(of, schema(document))


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        (regex("(a"), "cannot be compiled"),
        (regex("(a)\\1"), "cannot be compiled"),
        (regex("a\\"), "ends with a backslash"),
        (regex("\ud800"), "half of a surrogate pair"),
        (choice(), "JSON array of strings"),
        (Grammar(GrammarKind.CHOICE, '["a", 7]'), "JSON array of strings"),
        (Grammar(GrammarKind.CHOICE, "a"), "JSON array of strings"),
        (Grammar(GrammarKind.CHOICE, "[" * 100_000), "JSON array of strings"),
        (schema({"type": "string", "uniqueItems": True}), "#/uniqueItems is a keyword"),
    ],
)
def test_another_grammar_that_cannot_be_is_refused_too(of: Compiler, grammar: Grammar, said: str) -> None:
    assert said in refusal(of, grammar)


def test_a_client_cannot_turn_the_checks_off(of: Compiler) -> None:
    lenient = {"x-guidance": {"lenient": True}, "type": "string", "uniqueItems": True}
    assert "x-guidance is a keyword that is not supported" in refusal(of, schema(lenient))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: No such file"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json: is no JSON"),
    ],
)
def test_a_model_without_a_vocabulary_says_so_to_whoever_asks(tmp_path: Path, change: Any, said: str) -> None:
    write_tokenizer(tmp_path, PLAIN_TEMPLATE)
    change(tmp_path)
    of = compiler(tmp_path)
    assert said in of.prepare()
    assert said in refusal(of, regex("a"))


def test_a_model_without_an_end_says_so(folder: Path) -> None:
    of = compiler(folder, ends=(9999,))
    assert "no token that ends an answer" in of.prepare()
    assert "no token that ends an answer" in refusal(of, regex("a"))


def test_what_is_ready_says_so(of: Compiler) -> None:
    assert of.prepare() == "answers can be held to a grammar over 320 tokens"
    assert json.loads(choice("a").text) == ["a"]
