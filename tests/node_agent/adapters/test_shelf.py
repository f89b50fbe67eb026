"""Adapters that take more than they may: what was not used for longest makes room, and comes back when asked for."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from peft_adapters import publish

from coserve_agent.adapters.live import LiveAdapters
from coserve_agent.adapters.names import Names
from coserve_agent.adapters.registry import AdapterRegistry
from coserve_agent.adapters.served import Served
from coserve_agent.adapters.shelf import Shelf
from coserve_contract.messages import AdapterRecord

NAMES = ("a", "b", "c")
TTFT_MS = 2000


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture(scope="module")
def records(artifacts: Path, model_folder: Path) -> dict[str, AdapterRecord]:
    return {name: publish(artifacts, model_folder, name, seed=seed) for seed, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def agent(start_agent: Callable[..., Any], artifacts: Path) -> Any:
    return start_agent(artifacts=artifacts, ttft_ms=TTFT_MS)


@pytest.fixture
def shelf_of(
    agent: Any, artifacts: Path, records: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Shelf]]:
    """A registry in the agent, in the place of the one before, with room for so many of the published adapters."""
    made: list[AdapterRegistry] = []

    def empty() -> None:
        for registry in made:
            agent.call(lambda registry=registry: [registry._unload(one) for one in registry._loaded.values()])
        made.clear()

    def make(most: float | None) -> Shelf:
        empty()

        async def begin() -> AdapterRegistry:
            base = Served("base", None, "/model", 0)
            measure = Shelf(agent.agent.engine)
            probe = AdapterRegistry(measure, base, artifacts)
            await probe.sync({"a": records["a"]})
            one = measure.bytes
            probe._unload(probe._loaded.pop("a"))
            registry = AdapterRegistry(Shelf(agent.agent.engine, most and int(most * one)), base, artifacts)
            await registry.sync(records)
            return registry

        registry = asyncio.run_coroutine_threadsafe(begin(), agent.loop).result(60)
        made.append(registry)
        live = LiveAdapters(agent.agent.engine, list, registry._base)
        monkeypatch.setattr(agent.agent.generator, "models", Names(registry, live))
        return registry.shelf

    yield make
    empty()


def ask(agent: Any, model: str, max_tokens: int = 8) -> httpx.Response:
    body = {"model": model, "prompt": "one two", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return httpx.post(f"{agent.url}/v1/completions", json=body, timeout=60)


def text(agent: Any, model: str) -> str:
    answer = ask(agent, model)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def held(shelf: Shelf) -> list[str]:
    return sorted(version.uid.partition("@")[0] for version in shelf._held)


def test_what_made_room_comes_back_and_answers_as_before(agent: Any, shelf_of: Any) -> None:
    shelf_of(None)
    expected = {name: text(agent, name) for name in NAMES}
    assert len(set(expected.values())) == len(NAMES)
    shelf = shelf_of(2)
    assert held(shelf) == ["b", "c"], "the last two that were loaded"
    listed = [one["id"] for one in httpx.get(f"{agent.url}/v1/models").json()["data"]]
    assert listed == ["base", *NAMES]
    for name in ("a", "b", "c", "a", "a", "b", "c", "b", "a"):
        assert text(agent, name) == expected[name]
        assert name in held(shelf)
        assert len(held(shelf)) == 2
    text(agent, "b")
    text(agent, "c")
    assert held(shelf) == ["b", "c"], "a was not used for longest"


def test_requests_for_more_than_there_is_room_for_wait_and_none_fails(agent: Any, shelf_of: Any) -> None:
    shelf_of(None)
    expected = {name: text(agent, name) for name in NAMES}
    shelf = shelf_of(1)
    with ThreadPoolExecutor(12) as clients:
        names = [NAMES[n % 3] for n in range(60)]
        answers = list(clients.map(lambda name: ask(agent, name), names))
    assert {answer.status_code for answer in answers} <= {200, 503}
    for name, answer in zip(names, answers, strict=True):
        if answer.status_code == 200:
            assert answer.json()["choices"][0]["text"] == expected[name]
        else:
            assert answer.json()["error"]["code"] == "loading"
            assert answer.headers["retry-after"]
    assert sum(answer.status_code == 200 for answer in answers) >= 50, "those that are asked for less have their turns"
    assert len(held(shelf)) == 1
    assert not shelf._uses


def test_one_in_use_stays_and_others_are_told_to_come_again(agent: Any, shelf_of: Any) -> None:
    shelf = shelf_of(1)
    text(agent, "a")
    agent.call(lambda: shelf._uses.update(shelf._held.keys()))  # as a long answer does
    begun = time.monotonic()
    answer = ask(agent, "b")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")
    assert time.monotonic() - begun > 0.9 * TTFT_MS / 1000, "it has waited as long as was promised"
    assert held(shelf) == ["a"]
    waits = threading.Thread(target=text, args=(agent, "c"))
    agent.call(lambda: shelf.let_go(next(iter(shelf._held))))
    waits.start()
    waits.join()
    assert "a" not in held(shelf)


def test_one_that_is_larger_than_all_there_may_be_is_given_up(agent: Any, shelf_of: Any) -> None:
    shelf = shelf_of(0.5)
    assert held(shelf) == []
    answer = ask(agent, "a")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "adapter_not_loaded")
    failures = agent.agent.generator.models._registry.failures()
    assert "raise the memory for adapters" in failures[0].reason
