"""Pages that another request computed are found again, only where they hold the same, and change no bit."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coserve_engine.formats.artifacts import peft_files, write_folder
from coserve_engine.messages import (
    AdapterVersion,
    AddRequest,
    Cancel,
    IterationDone,
    LoadAdapter,
    PromptDone,
    SamplingParams,
    TokenBatch,
    UnloadAdapter,
)
from coserve_engine.model.executor import Executor
from coserve_engine.numerics import Numerics
from coserve_engine.serving import prefix
from coserve_engine.serving.prefix import KeyChain

GREEDY = SamplingParams(20, ignore_eos=True)
VERSION = AdapterVersion("a", 1)
OTHER = AdapterVersion("a", 2)

USED = ((None, 0), (VERSION, 1), (VERSION, 2), (OTHER, 1))
"""Adapter versions and loads of them."""
tokens = st.lists(st.integers(0, 127), max_size=70)


@given(tokens, st.lists(st.integers(0, 70), max_size=4), st.sampled_from((None, VERSION, OTHER)))
def test_keys_do_not_depend_on_how_a_sequence_grew(
    sequence: list[int], lengths: list[int], adapter: AdapterVersion | None
) -> None:
    whole, grown = KeyChain(adapter, 16), KeyChain(adapter, 16)
    whole.extend(sequence, len(sequence))
    for length in sorted(min(n, len(sequence)) for n in lengths):
        grown.extend(sequence, length)
        assert len(grown.keys) == length // 16
    grown.extend(sequence, len(sequence))
    assert grown.keys == whole.keys


@given(tokens, tokens, st.sampled_from(((None, 0), (VERSION, 1))), st.sampled_from(USED))
def test_keys_are_equal_as_far_as_tokens_and_adapter_are(
    a: list[int], b: list[int], adapter: tuple[AdapterVersion | None, int], other: tuple[AdapterVersion | None, int]
) -> None:
    first, second = (KeyChain(version, 16, load) for version, load in (adapter, other))
    first.extend(a, len(a))
    second.extend(b, len(b))
    for n, (one, two) in enumerate(zip(first.keys, second.keys, strict=False), 1):
        assert (one == two) == (a[: n * 16] == b[: n * 16] and adapter == other)


# ---- the engine ----


@pytest.fixture
def driver(driver: Any) -> Any:
    """Of engines with small pages, so that short prompts have several."""
    return partial(driver, numerics=Numerics(page=16))


def cached(d: Any) -> dict[str, int]:
    return {event.request_id: event.cached_tokens for event in d.of(PromptDone)}


def serve(d: Any, name: str, prompt: Any, adapter: AdapterVersion | None = None) -> list[int]:
    d.submit(AddRequest(name, tuple(prompt), GREEDY, d.clock.now, adapter))
    return list(d.run().tokens()[name])


def alone(driver: Any, adapters: dict[AdapterVersion, Any], prompt: Any, version: AdapterVersion | None) -> list[int]:
    d = driver()
    d.engine._adapters.update(adapters)
    return serve(d, "alone", prompt, version)


@pytest.fixture
def adapters(rig: Any, random_adapter: Any) -> dict[AdapterVersion, Any]:
    executor = rig().executor
    return {VERSION: random_adapter(executor, seed=1).weights, OTHER: random_adapter(executor, seed=2).weights}


@pytest.mark.parametrize("page", (16, 64))
@pytest.mark.parametrize("length", (40, 64, 65, 150))
@pytest.mark.parametrize("version", (None, VERSION))
def test_a_hit_changes_no_bit(
    driver: Any,
    draw_tokens: Any,
    sampled_logits: list[torch.Tensor],
    adapters: Any,
    page: int,
    length: int,
    version: Any,
) -> None:
    prompt = draw_tokens(5, length)
    d = driver(numerics=Numerics(page=page))
    d.engine._adapters.update(adapters)
    first = serve(d, "first", prompt, version)
    expected = list(sampled_logits)
    sampled_logits.clear()
    assert serve(d, "second", prompt, version) == first
    assert all(torch.equal(a, b) for a, b in zip(sampled_logits, expected, strict=True))
    assert cached(d) == {"first": 0, "second": (length - 1) // page * page}
    computed = [event.prefill_tokens + event.decode_tokens for event in d.of(IterationDone)]
    assert sum(computed) == 2 * (length + 19) - (length - 1) // page * page, "what was found is not computed again"


def test_an_output_is_found_by_the_next_turn(driver: Any, draw_tokens: Any) -> None:
    prompt = draw_tokens(5, 40)
    d = driver()
    turn = [*prompt, *serve(d, "first", prompt), *draw_tokens(6, 10)]
    again = serve(d, "second", turn)
    assert cached(d)["second"] == 48, "59 tokens were computed, 3 pages of them are whole"
    assert again == alone(driver, {}, turn, None)
    assert (d.engine.requests.prefix_queries, d.engine.requests.prefix_hits) == (40 + 70, 48)


def test_requests_that_run_share_their_pages(driver: Any, draw_tokens: Any) -> None:
    prompt = draw_tokens(5, 100)
    d = driver()
    d.submit(AddRequest("first", prompt, SamplingParams(60, ignore_eos=True), 0.0))
    d.step()
    d.submit(AddRequest("second", prompt, GREEDY, 0.0))
    d.step()
    first, second = d.engine.requests.running.values()
    assert first.pages[:6] == second.pages[:6]
    assert d.engine.executor.ledger.held_by("request:") == len({*first.pages, *second.pages})
    d.run()
    assert d.tokens()["second"] == d.tokens()["first"][:20] == alone(driver, {}, prompt, None)


def write_shared(d: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pages that a forward writes although somebody else could see it; filled as the engine runs."""
    ledger, found, page = d.engine.executor.ledger, [], d.engine.executor.numerics.page
    forward = d.engine.executor.forward

    def spy(segments: Any, rows: Any, *rest: Any) -> Any:
        for segment in segments:
            if segment.slot in rows:
                pages = rows[segment.slot].pages[segment.start // page : -(-(segment.start + segment.length) // page)]
                found.extend(p for p in pages if ledger.shared(p))
        return forward(segments, rows, *rest)

    monkeypatch.setattr(d.engine.executor, "forward", spy)
    return found


@pytest.mark.parametrize("broken", (False, True))
def test_shared_pages_are_never_written(
    driver: Any, draw_tokens: Any, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    """Broken: a hit's pages are taken, but its tokens are computed into them again."""
    d = driver(jitter_s=0.01)
    written = write_shared(d, monkeypatch)
    start = type(d.engine.requests)._start

    def from_the_start(self: Any, request: Any, hits: Any, now_s: float) -> None:
        start(self, request, hits, now_s)
        request.done = 0

    if broken:
        monkeypatch.setattr(type(d.engine.requests), "_start", from_the_start)
    for n in range(12):
        d.submit(AddRequest(f"r{n}", draw_tokens(n % 3, 30 + 7 * n), GREEDY, d.clock.now))
        d.step()
    d.run()
    assert sum(cached(d).values()) > 0
    assert bool(written) is broken


def test_equal_prompts_that_come_at_once_are_computed_once(driver: Any, draw_tokens: Any) -> None:
    """The first computes the pages; the others wait for them and compute their last tokens only."""
    prompt = draw_tokens(5, 100)
    d = driver(max_batch_tokens=40)
    for n in range(6):
        params = SamplingParams(20, temperature=0.9, seed=n, ignore_eos=True)
        d.submit(AddRequest(f"r{n}", prompt, params, 0.0))
    d.run()
    assert cached(d) == {"r0": 0, **{f"r{n}": 96 for n in range(1, 6)}}
    alone = driver()
    alone.submit(AddRequest("r3", prompt, SamplingParams(20, temperature=0.9, seed=3, ignore_eos=True), 0.0))
    assert d.tokens()["r3"] == alone.run().tokens()["r3"]


@pytest.mark.parametrize("end", ("cancelled", "put out"))
def test_who_waits_for_a_page_goes_on_if_it_never_comes(driver: Any, draw_tokens: Any, end: str) -> None:
    prompt = draw_tokens(5, 100)
    d = driver(max_batch_tokens=40)
    for name in ("first", "second"):
        d.submit(AddRequest(name, prompt, GREEDY, 0.0))
    d.step()
    assert list(d.engine.requests.running) == [1]
    if end == "cancelled":
        d.submit(Cancel("first"))
    else:
        d.engine.requests.preempt_youngest()
    d.run()
    assert d.tokens()["second"] == alone(driver, {}, prompt, None)
    assert not d.engine.requests._computing


# ---- adapters ----


def three_versions(driver: Any, adapters: Any, prompt: Any) -> tuple[Any, dict[Any, list[int]]]:
    d = driver()
    d.engine._adapters.update(adapters)
    return d, {version: serve(d, str(n), prompt, version) for n, version in enumerate((None, VERSION, OTHER, VERSION))}


def test_another_adapter_version_is_no_hit(driver: Any, draw_tokens: Any, adapters: Any) -> None:
    prompt = draw_tokens(5, 100)
    d, found = three_versions(driver, adapters, prompt)
    assert cached(d) == {"0": 0, "1": 0, "2": 0, "3": 96}
    for version, output in found.items():
        assert output == alone(driver, adapters, prompt, version)


def test_a_key_without_the_adapter_gives_wrong_logits(
    driver: Any, draw_tokens: Any, adapters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = draw_tokens(5, 100)
    right = {version: alone(driver, adapters, prompt, version) for version in (None, VERSION, OTHER)}
    root_key = prefix.root_key
    monkeypatch.setattr(prefix, "root_key", lambda adapter, load: root_key(None, 0))
    d, found = three_versions(driver, adapters, prompt)
    assert cached(d)["1"] == 96
    assert found[None] == right[None]
    assert found[VERSION] != right[VERSION]
    assert found[OTHER] != right[OTHER]


def scores(d: Any, name: str, prompt: Any) -> list[Any]:
    """Log-probabilities of the answer under VERSION."""
    d.submit(AddRequest(name, prompt, replace(GREEDY, logprobs=3), d.clock.now, VERSION))
    d.run()
    return [token.logprobs for batch in d.of(TokenBatch) for token in batch.tokens if token.request_id == name]


@pytest.mark.parametrize("broken", (False, True))
def test_a_version_that_is_loaded_again_with_other_weights(
    driver: Any, draw_tokens: Any, random_adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    """Broken: the key does not say which load of the version it is. A request of the first load runs meanwhile."""
    root_key = prefix.root_key
    if broken:
        monkeypatch.setattr(prefix, "root_key", lambda adapter, load: root_key(adapter, 0))
    d, fresh, prompt = driver(), driver(), draw_tokens(5, 100)
    folders = [str(tmp_path / str(seed)) for seed in (1, 2)]
    for seed, folder in enumerate(folders, 1):
        adapter = random_adapter(d.engine.executor, seed=seed)
        write_folder(Path(folder), *peft_files(adapter.layout, adapter.flat, "base"))
    d.submit(LoadAdapter(VERSION, folders[0]))
    first = scores(d.run(), "first", prompt)
    assert scores(d, "again", prompt) == first
    d.submit(AddRequest("running", prompt, SamplingParams(60, ignore_eos=True), d.clock.now, VERSION))
    d.step()
    d.submit(UnloadAdapter(VERSION), LoadAdapter(VERSION, folders[1]))
    while d.engine._files.idle is False:
        d.step()
    assert d.engine.requests.running
    second = scores(d, "second", prompt)
    fresh.submit(LoadAdapter(VERSION, folders[1]))
    right = scores(fresh.run(), "fresh", prompt)
    assert cached(d) == {"first": 0, "again": 96, "running": 96, "second": 96 if broken else 0}
    assert (second == right) is not broken
    assert first != right
    assert scores(d, "third", prompt) == second
    assert cached(d)["third"] == 96


def test_pages_of_a_diverged_adapter_are_not_offered(driver: Any, draw_tokens: Any, random_adapter: Any) -> None:
    d = driver()
    adapter = random_adapter(d.engine.executor)
    adapter.flat.mul_(1e25)
    d.engine._adapters[VERSION] = adapter.weights
    for name in ("first", "second"):
        d.submit(AddRequest(name, draw_tokens(5, 100), GREEDY, 0.0, VERSION))
        d.run()
    assert len(d.failures) == 2
    assert d.engine.requests.prefix_hits == 0
    executor: Executor = d.engine.executor
    assert executor.ledger.cached_pages == 0
    executor.ledger.reserve("request:99", executor.ledger.total)
    assert torch.isfinite(executor.cache.k).all()


def test_an_adapters_pages_are_cleaned_before_another_gets_them(
    driver: Any, draw_tokens: Any, random_adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its logits may be finite while a key is not; the pages stay cached for it and are cleaned when they go."""
    d = driver(kv_cache_bytes=18 * 8192)
    executor: Executor = d.engine.executor
    d.engine._adapters[VERSION] = random_adapter(executor).weights
    serve(d, "first", draw_tokens(5, 100), VERSION)
    executor.cache.k[:, :, 16:] = float("inf")
    assert executor.ledger.cached_pages == 7
    whole = executor.ledger.reserve("request:99", executor.ledger.total)
    pages = [page for page in whole if bool(torch.isfinite(executor.cache.k[:, :, page * 16 : page * 16 + 16]).all())]
    assert len(pages) == 8  # the last was not full
