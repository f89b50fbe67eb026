"""Answers that are held to a grammar, in a batch with others: they are what they would be alone, and the others too."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import llguidance
import pytest
import torch
from engine_driver import Driver, depths, late_driver
from grammars import END, JSON_OBJECT, ROOMY, VOCAB, choice, regex, schema
from stories import serve, story

from coserve_engine.grammar.matching import Matching
from coserve_engine.grammar.vocabulary import read_vocabulary
from coserve_engine.layout.masks import TokenMasks
from coserve_engine.messages import (
    AddRequest,
    Cancel,
    FinishReason,
    PassDone,
    SamplingParams,
    StepDone,
    TokenBatch,
)
from coserve_engine.serving.serving import Serving

PAGE_BYTES = 2 * 2 * 2 * 8 * 16 * 4
TINY = ROOMY | {"kv_cache_bytes": 18 * PAGE_BYTES, "max_batch_tokens": 40}
"""Room for about two requests: others are put out."""
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "é"]}, "maxItems": 4},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
GRAMMARS = (schema(PERSON), JSON_OBJECT, regex(r"(one|two|three)( \d+){3,40}"), choice("yes", "no", "the quick fox"))


def orders(seed: int, count: int = 10) -> list[AddRequest]:
    """Every other one with a grammar, and all that a request may ask for."""
    source, made = random.Random(seed), []
    for n in range(count):
        length = source.randint(10, 90)
        params = SamplingParams(
            length,
            temperature=source.choice((0.0, 0.8, 2.0)),
            top_p=source.choice((1.0, 0.9)),
            top_k=source.choice((0, 20)),
            min_p=source.choice((0.0, 0.05)),
            seed=n,
            frequency_penalty=source.choice((0.0, 0.4)),
            logit_bias=source.choice(((), ((20, 4.0), (33, -100.0)))),
            stop_token_ids=tuple(source.sample(range(200, 300), source.choice((0, 0, 4)))),
            min_tokens=source.choice((0, 0, min(5, length))),
            logprobs=source.choice((None, 0, 3)),
            ignore_eos=source.random() < 0.5,
            grammar=GRAMMARS[n // 2 % len(GRAMMARS)] if n % 2 else None,
        )
        prompt = tuple(source.randrange(4, VOCAB) for _ in range(source.randint(1, 60)))
        made.append(AddRequest(f"r{n}", prompt, params, 0.0))
    return made


def one_by_one(d: Driver, asked: list[AddRequest]) -> dict[str, list[object]]:
    """Each alone."""
    for one in asked:
        d.submit(one)
        d.run()
    return story(d)


def texts(d: Driver, folder: Path) -> dict[str, str]:
    """Of the answers, without what ended them."""
    vocabulary = read_vocabulary(folder, VOCAB)
    of_ids = {id: b"" if id == END else token for id, token in enumerate(vocabulary.tokens)}
    return {name: b"".join(of_ids[id] for id in ids).decode(errors="replace") for name, ids in d.tokens().items()}


def finishes(d: Driver) -> dict[str, FinishReason]:
    return {token.request_id: token.finish for batch in d.of(TokenBatch) for token in batch.tokens if token.finish}


# ---- in company ----


@pytest.mark.parametrize("settings", [ROOMY, TINY], ids=["roomy", "tiny"])
@pytest.mark.parametrize("seed", range(2))
def test_each_says_what_it_would_alone_beside_a_job(
    drive: Any, training: Any, start_job: Any, seed: int, settings: dict[str, Any]
) -> None:
    asked = orders(seed)
    together = serve(drive(jitter_s=1e-5, **settings), asked, seed, start_job(), *training(steps=2))
    assert bool(together.engine.requests.preemptions) is (settings is TINY)
    assert together.of(StepDone)
    found = story(together)
    assert set(found) == {one.request_id for one in asked}
    assert one_by_one(drive(), asked) == found
    assert together.engine.executor.ledger.held_by("request:") == 0


@pytest.mark.parametrize("settings", [ROOMY, TINY], ids=["roomy", "tiny"])
def test_others_keep_their_bits(
    drive: Any, training: Any, start_job: Any, sampled_logits: list[torch.Tensor], settings: dict[str, Any]
) -> None:
    """The rows that they sample from, and so the job, as if nobody had a grammar: no neighbour in another's place."""
    asked, commands = orders(5), (start_job(), *training(steps=2))
    free = [one for one in asked if one.params.grammar is None]
    with_others = serve(drive(jitter_s=1e-5, **settings), asked, 5, *commands)
    among_free = serve(drive(jitter_s=1e-5, **settings), free, 5, *commands)
    names = {one.request_id for one in free}
    assert {name: told for name, told in story(with_others).items() if name in names} == story(among_free)
    for kind in (PassDone, StepDone):
        assert with_others.of(kind) == among_free.of(kind)
        assert among_free.of(kind)
    assert torch.equal(with_others.parameters(), among_free.parameters())


def test_masks_on_the_neighbours_rows_would_be_found(drive: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the two above."""
    asked = orders(5)
    expected = story(serve(drive(), asked, 5))
    masks = Serving.masks

    def shifted(self: Serving, rows: Any) -> TokenMasks | None:
        found = masks(self, rows)
        count = sum(row.place is not None for row in rows)
        return None if found is None else replace(found, rows=[(row + 1) % count for row in found.rows])

    monkeypatch.setattr(Serving, "masks", shifted)
    assert story(serve(drive(), asked, 5)) != expected


def test_several_answers_to_one_prompt_have_a_place_each(
    drive: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """n of a request are as many requests with one grammar (vllm#4109); the control has them share its place."""
    prompt = tuple(range(40, 70))

    def asked() -> list[AddRequest]:
        params = SamplingParams(80, temperature=1.5, grammar=schema(PERSON))
        return [AddRequest(f"r{n}", prompt, replace(params, seed=n), 0.0) for n in range(5)]

    together = serve(drive(), asked(), 0)
    assert len(set(texts(together, folder).values())) == 5
    assert one_by_one(drive(), asked()) == story(together)
    made = Matching.__init__
    shared: list[llguidance.LLMatcher] = []

    def sharing(self: Matching, matcher: llguidance.LLMatcher, *rest: Any) -> None:
        shared.append(matcher)
        made(self, shared[0], *rest)

    monkeypatch.setattr(Matching, "__init__", sharing)
    assert story(serve(drive(), asked(), 0)) != story(together)


def test_who_is_put_out_goes_on_where_it_was(drive: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control forgets the answer's place, as servers did whose grammar was no function of the output."""
    prompts = [tuple(range(40 + n, 70 + n)) for n in range(4)]
    params = SamplingParams(120, temperature=1.0, ignore_eos=True, grammar=regex(r"(one|two)( \d\d?){60}"))
    asked = [AddRequest(f"r{n}", prompt, replace(params, seed=n), 0.0) for n, prompt in enumerate(prompts)]
    roomy, tiny = serve(drive(), asked, 0), serve(drive(**TINY), asked, 0)
    assert tiny.engine.requests.preemptions > 1
    assert story(tiny) == story(roomy)
    preempt = type(tiny.engine.requests).preempt_youngest

    def forgetful(self: Any) -> None:
        request = next(reversed(self.running.values()))
        preempt(self)
        request.matching._read = 0

    monkeypatch.setattr(type(tiny.engine.requests), "preempt_youngest", forgetful)
    assert story(serve(drive(**TINY), asked, 0)) != story(roomy)


# ---- ahead of a device ----


@pytest.mark.parametrize("settings", [ROOMY, TINY], ids=["roomy", "tiny"])
@pytest.mark.parametrize("seed", range(2))
def test_ahead_of_a_device_it_says_the_same(
    folder: Path, drive: Any, monkeypatch: pytest.MonkeyPatch, seed: int, settings: dict[str, Any]
) -> None:
    """The forward is enqueued before the token is known that decides what its row may choose: one runs ahead still."""
    asked, unseen = orders(seed), depths(monkeypatch)
    late = serve(late_driver(str(folder), {**settings, "threads": 1}, seed), asked, seed)
    now = serve(drive(**settings), asked, seed)
    assert story(late) == story(now)
    assert set(unseen) == {0, 1}
    device = late.engine.executor.copies
    assert device.waits == 0
    assert late.engine.executor.ledger.held_by("request:") == 0


def test_ahead_of_a_device_a_mask_waits_for_the_token_before_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    monkeypatch.setattr(Serving, "known", lambda self, rows: True)
    with pytest.raises(OverflowError):  # no token is negative
        serve(late_driver(str(folder), {**ROOMY, "threads": 1}), orders(0), 0)


@pytest.mark.parametrize("after", range(4))
def test_ahead_of_a_device_a_request_may_be_cancelled_at_any_time(folder: Path, after: int) -> None:
    d = late_driver(str(folder), {**ROOMY, "threads": 1}, after)
    params = SamplingParams(60, grammar=regex(r"[a-z]{900}"))
    d.submit(AddRequest("a", (9, 10), params, 0.0), AddRequest("b", (11, 12), params, 0.0))
    d.engine.serving.compiler._thread.submit(int).result()
    for _ in range(after):
        d.step()
    d.submit(Cancel("a"))
    before = len(d.tokens().get("a", ()))
    d.run()
    assert (len(d.tokens().get("a", ())), len(d.tokens()["b"])) == (before, 60)
    assert d.engine.executor.ledger.held_by("request:") == 0


# ---- what it says ----


@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_answers_are_what_was_asked_for(drive: Any, folder: Path, temperature: float) -> None:
    d = drive()
    for n in range(12):
        bias = ((read_vocabulary(folder, VOCAB).tokens.index(b'"'), 4.0),)
        params = SamplingParams(200, temperature, seed=n, logit_bias=bias, grammar=GRAMMARS[n % 4])
        d.submit(AddRequest(f"r{n}", (40 + n, 41), params, 0.0))
    d.run()
    for n, (name, text) in enumerate(texts(d, folder).items()):
        if finishes(d)[name] is FinishReason.STOP:
            if n % 4 == 0:
                jsonschema.validate(json.loads(text), PERSON)
            elif n % 4 == 1:
                assert isinstance(json.loads(text), dict)
            elif n % 4 == 3:
                assert text in ("yes", "no", "the quick fox")
    assert sum(finish is FinishReason.STOP for finish in finishes(d).values()) >= 6


@pytest.mark.parametrize(
    ("extra", "output", "finish"),
    [
        ({}, "ok", FinishReason.STOP),
        ({"ignore_eos": True}, "ok", FinishReason.STOP),
        ({"min_tokens": 20}, "ok", FinishReason.STOP),
        ({"ignore_eos": True, "min_tokens": 20}, "ok", FinishReason.STOP),
        ({"stop_token_ids": (250, 251)}, "ok", FinishReason.STOP),
        ({"max_tokens": 1}, "o", FinishReason.LENGTH),
        ({"logit_bias": ((END, -100.0), (40, 100.0))}, "ok", FinishReason.STOP),
    ],
)
def test_what_ends_an_answer_ends_it_where_nothing_else_may_follow(
    drive: Any, folder: Path, extra: dict[str, Any], output: str, finish: FinishReason
) -> None:
    d = drive()
    d.submit(AddRequest("r", (9,), SamplingParams(**{"max_tokens": 30, "grammar": regex("ok")} | extra), 0.0))
    d.run()
    assert (texts(d, folder)["r"][: len(output)], finishes(d)["r"]) == (output, finish)


def test_the_end_is_put_off_while_the_grammar_goes_on(drive: Any) -> None:
    d, many = drive(), regex("a*")
    for name, extra in (("ignored", {"ignore_eos": True}), ("least", {"min_tokens": 7}), ("open", {})):
        bias = ((END, 100.0),)
        d.submit(
            AddRequest(
                name, (9,), SamplingParams(**{"max_tokens": 20, "logit_bias": bias, "grammar": many, **extra}), 0.0
            )
        )
    d.run()
    assert {name: len(ids) for name, ids in d.tokens().items()} == {"ignored": 20, "least": 8, "open": 1}
    assert finishes(d) == {"ignored": FinishReason.LENGTH, "least": FinishReason.STOP, "open": FinishReason.STOP}


def test_log_probabilities_are_the_models_own(drive: Any, sampled_logits: list[torch.Tensor]) -> None:
    d = drive()
    d.submit(AddRequest("r", (9, 30), SamplingParams(20, logprobs=3, grammar=regex("[ab]{20}")), 0.0))
    d.run()
    told = [token for batch in d.of(TokenBatch) for token in batch.tokens]
    logp = torch.stack(sampled_logits).log_softmax(-1)
    for row, token in zip(logp, told, strict=True):
        assert token.logprobs is not None
        assert token.logprobs.logprob == pytest.approx(float(row[token.token]), abs=1e-5)
        assert [id for id, _ in token.logprobs.top] == row.topk(3).indices.tolist()
        assert token.logprobs.rank == int((row >= row[token.token]).sum())
    assert any(token.logprobs is not None and token.logprobs.rank > 1 for token in told), "the grammar chose"
