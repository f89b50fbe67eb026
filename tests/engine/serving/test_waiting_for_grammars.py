"""Requests whose grammars are being compiled, are refused, or come to nothing in the middle of an answer."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from engine_driver import Driver, gather, late_driver
from grammars import END, ROOMY, VOCAB, choice, regex, schema

from coserve_engine.config import EngineConfig
from coserve_engine.grammar.vocabulary import read_vocabulary
from coserve_engine.host import EngineHost
from coserve_engine.layout.masks import TokenMasks
from coserve_engine.messages import (
    AddRequest,
    Cancel,
    EngineReady,
    Grammar,
    LoadReport,
    RequestFailed,
    SamplingParams,
    TokenBatch,
)
from coserve_engine.model.executor import Executor


class Held:
    """Keeps the thread that compiles."""

    def __init__(self, d: Driver) -> None:
        self._gate = threading.Event()
        self.done = d.engine.serving.compiler._thread.submit(self._gate.wait)

    def release(self, d: Driver) -> None:
        self._gate.set()
        d.engine.serving.compiler._thread.submit(int).result()


def some(name: str, grammar: Grammar | None, tokens: int = 8) -> AddRequest:
    return AddRequest(name, (9, 10, 11), SamplingParams(tokens, ignore_eos=True, grammar=grammar), 0.0)


def steps(d: Driver, count: int = 30) -> None:
    for _ in range(count):
        d.step()


def test_others_go_on_while_a_grammar_is_compiled(drive: Any) -> None:
    d = drive(max_requests=1)
    held = Held(d)
    d.submit(some("held", regex("[a-z]{9}")), some("free", None))
    steps(d)
    assert set(d.tokens()) == {"free"}
    assert not d.engine.idle
    assert not d.engine.requests.waiting
    held.release(d)
    d.run()
    assert {name: len(ids) for name, ids in d.tokens().items()} == {"free": 8, "held": 8}


def test_a_request_that_waits_for_its_grammar_is_counted(drive: Any) -> None:
    d = drive(max_waiting=2)
    held = Held(d)
    d.submit(some("a", regex("a{9}")), some("a", None), some("b", regex("b{9}")), some("c", None))
    d.clock.now += 1.0
    d.step()
    assert [(one.request_id, one.code) for one in d.of(RequestFailed)] == [
        ("a", "duplicate_request"),
        ("c", "overloaded"),
    ]
    assert d.of(LoadReport)[-1].waiting == 2
    held.release(d)
    d.run()
    assert set(d.tokens()) == {"a", "b"}


@pytest.mark.parametrize("compiled", [False, True])
def test_a_request_is_cancelled_while_its_grammar_is_compiled_and_when_it_just_was(drive: Any, compiled: bool) -> None:
    d = drive()
    held = Held(d)
    d.submit(some("gone", regex("a{9}")), some("stays", regex("a{9}")))
    if compiled:
        held.release(d)
    d.submit(Cancel("gone"), some("gone", None, 3))
    held.release(d)
    d.run()
    assert {name: len(ids) for name, ids in d.tokens().items()} == {"stays": 8, "gone": 3}
    d.submit(some("again", regex("a{9}")), Cancel("again"))
    assert "again" not in d.run().tokens(), "nor if it was known at once"
    assert d.engine.idle


def test_a_grammar_that_is_not_taken_is_said_as_a_mistake_of_the_request(drive: Any) -> None:
    d = drive()
    d.submit(some("bad", schema({"properties": {"a": {"uniqueItems": True}}})), some("good", regex("a{9}")))
    d.run()
    failed = d.one(RequestFailed)
    assert (failed.request_id, failed.code, failed.field) == ("bad", "invalid_parameter", "grammar")
    assert "#/properties/a/uniqueItems" in failed.message
    assert set(d.tokens()) == {"good"}


@pytest.mark.parametrize("late", [False, True])
def test_an_answer_that_cannot_go_on_fails_alone(folder: Path, drive: Any, late: bool) -> None:
    """Its grammar grows too large behind the first token."""
    many = {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(3000)}}
    d = late_driver(str(folder), {**ROOMY, "threads": 1}) if late else drive()
    d.submit(some("large", schema(many)), some("free", None), some("held", regex("a{9}")))
    d.run()
    failed = d.one(RequestFailed)
    assert (failed.request_id, failed.code) == ("large", "invalid_parameter")
    assert "cannot be followed behind 1 tokens" in failed.message
    assert {name: len(ids) for name, ids in d.tokens().items()} == {"large": 1, "free": 8, "held": 8}
    assert d.engine.executor.ledger.held_by("request:") == 0


def test_an_engines_process_holds_answers_to_a_grammar(folder: Path) -> None:
    """Commands are plain; the line for its log says that it can."""
    host = EngineHost.start(EngineConfig(str(folder), **ROOMY, finetuning=False))
    try:
        (ready,) = [one for one in gather(host, bool) if isinstance(one, EngineReady)]
        assert "answers can be held to a grammar over 320 tokens" in ready.notes
        host.submit(some("r", choice("yes", "no"), 20))
        host.submit(some("bad", regex("("), 20))

        def over(events: Sequence[object]) -> bool:
            ends = [one for one in events if isinstance(one, TokenBatch) and any(t.finish for t in one.tokens)]
            return bool(ends) and any(isinstance(one, RequestFailed) for one in events)

        events = gather(host, over)
        tokens = [token for one in events if isinstance(one, TokenBatch) for token in one.tokens]
        spelt = read_vocabulary(folder, VOCAB).tokens
        assert b"".join(spelt[token.token] for token in tokens[:-1]) in (b"yes", b"no")
        assert tokens[-1].token == END
    finally:
        host.close()


def test_an_executor_without_masks_chooses_as_before(drive: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody has a grammar nothing is computed for one."""
    given: list[TokenMasks | None] = []
    sample = Executor.sample

    def spy(self: Executor, forwarded: Any, masks: TokenMasks | None = None) -> Any:
        given.append(masks)
        return sample(self, forwarded, masks)

    monkeypatch.setattr(Executor, "sample", spy)
    d = drive()
    d.submit(some("free", None))
    d.run()
    assert set(given) == {None}
    d.submit(some("held", regex("a{9}")))
    d.run()
    assert None not in given[8:]
