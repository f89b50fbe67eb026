"""Published adapters in a real engine: a name flips to a new version, and a request keeps the one it began with."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from peft_adapters import publish

from coserve_agent.adapters.live import LiveAdapters
from coserve_agent.adapters.names import Names
from coserve_agent.adapters.registry import REMOVE_AFTER_S, RETRY_S, AdapterRegistry
from coserve_agent.adapters.served import Served
from coserve_agent.adapters.shelf import Shelf
from coserve_contract.messages import AdapterRecord

MakeRecord = Callable[..., AdapterRecord]


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture(scope="module")
def record(artifacts: Path, model_folder: Path) -> MakeRecord:
    """Write an adapter with PEFT itself; another `seed` is another adapter."""

    def make(name: str, number: int = 1, seed: int = 0, rank: int = 4) -> AdapterRecord:
        return publish(artifacts, model_folder, name, number, seed, rank)

    return make


@pytest.fixture(scope="module")
def agent(start_agent: Callable[..., Any], artifacts: Path) -> Any:
    return start_agent(artifacts=artifacts)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def sync(agent: Any, artifacts: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, ...]]:
    """A fresh registry in the agent; call with the published records."""
    base = Served("base", None, "/model", 0)
    registry = AdapterRegistry(Shelf(agent.agent.engine), base, artifacts, clock)
    live = LiveAdapters(agent.agent.engine, lambda: [], base)
    monkeypatch.setattr(agent.agent.generator, "models", Names(registry, live))

    def call(*records: AdapterRecord) -> tuple[str, ...]:
        future = asyncio.run_coroutine_threadsafe(registry.sync({one.name: one for one in records}), agent.loop)
        return future.result(60)

    call.registry = registry  # type: ignore[attr-defined]
    return call


def ask(agent: Any, model: str, max_tokens: int = 24) -> httpx.Response:
    body = {"model": model, "prompt": "one two", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return httpx.post(f"{agent.url}/v1/completions", json=body, timeout=60)


def text(agent: Any, model: str, max_tokens: int = 24) -> str:
    answer = ask(agent, model, max_tokens)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def test_published_adapters_answer_by_name(agent: Any, sync: Any, record: MakeRecord) -> None:
    assert ask(agent, "one").status_code == 404
    assert sync(record("one"), record("two", seed=1, rank=8)) == ()
    texts = {name: text(agent, name) for name in ("base", "one", "two")}
    assert len(set(texts.values())) == 3
    assert sync.registry.numbers() == {"one": 1, "two": 1}
    listed = httpx.get(f"{agent.url}/v1/models").json()["data"]
    assert [(one["id"], one["parent"]) for one in listed] == [("base", None), ("one", "base"), ("two", "base")]
    assert listed[1]["root"].endswith("adapters/one/v1")


def test_a_running_request_keeps_the_version_it_began_with(agent: Any, sync: Any, record: MakeRecord) -> None:
    sync(record("flip", 1, seed=3))
    old = text(agent, "flip", 240)
    seen: list[str] = []
    begun = threading.Event()

    def read() -> None:
        body = {"model": "flip", "prompt": "one two", "max_tokens": 240, "temperature": 0, "ignore_eos": True}
        with httpx.stream("POST", f"{agent.url}/v1/completions", json=body | {"stream": True}, timeout=60) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    seen.append(json.loads(line[6:])["choices"][0]["text"])
                    begun.set()

    client = threading.Thread(target=read)
    client.start()
    assert begun.wait(30)
    assert sync(record("flip", 2, seed=4)) == ()
    new = text(agent, "flip", 240)
    client.join()
    assert "".join(seen) == old
    assert new != old
    assert sync.registry.numbers() == {"flip": 2}


def test_a_corrupt_adapter_is_missing_until_it_is_whole(
    agent: Any, sync: Any, record: MakeRecord, artifacts: Path, clock: Clock
) -> None:
    good, bad = record("good"), record("bad", seed=9)
    file = artifacts / bad.path / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert sync(bad, good) == ("bad",)
    assert text(agent, "good")
    answer = ask(agent, "bad")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "adapter_not_loaded")
    assert answer.headers["retry-after"] == str(int(RETRY_S))
    assert str(artifacts) not in answer.text
    file.write_bytes(content)
    assert sync(bad, good) == ("bad",)  # not tried again at once
    clock.now_s += RETRY_S + 0.1
    assert sync(bad, good) == ()
    assert text(agent, "bad")
    assert sync.registry.failures() == ()


def test_what_does_not_load_is_told_and_tried_ever_more_rarely(
    sync: Any, record: MakeRecord, artifacts: Path, clock: Clock
) -> None:
    bad = record("often", seed=9)
    file = artifacts / bad.path / "adapter_model.safetensors"
    file.write_bytes(b"x")
    tried_at_s = []
    for second in range(1500):
        clock.now_s = float(second)
        before = sum(one.tries for one in sync.registry.failures())
        sync(bad)
        (failed,) = sync.registry.failures()
        assert (failed.name, failed.number) == ("often", 1)
        if failed.tries > before:
            tried_at_s.append(second)
    assert tried_at_s == [0, 5, 15, 35, 75, 155, 315, 615, 915, 1215]
    assert failed.tries == 10
    assert "adapter_model.safetensors: its checksum differs" in failed.reason
    assert sync.registry.pending() == ()
    assert sync(record("often", 2, seed=8)) == (), "another version is tried at once"


def test_a_version_that_does_not_load_leaves_the_one_before_in_its_place(
    agent: Any, sync: Any, record: MakeRecord, artifacts: Path
) -> None:
    sync(record("kept", 1, seed=3))
    old, bad = text(agent, "kept"), record("kept", 2, seed=4)
    (artifacts / bad.path / "adapter_config.json").unlink()
    assert sync(bad) == ("kept",)
    assert text(agent, "kept") == old
    assert sync.registry.numbers() == {"kept": 1}


def test_gone_back_to_a_version_answers_as_it_did(agent: Any, sync: Any, record: MakeRecord) -> None:
    """Whatever is left of the other in the engine's prefix cache: same name, same prompt."""
    one, two = record("back", 1, seed=3), record("back", 2, seed=4)
    sync(one)
    first = text(agent, "back")
    sync(two)
    second = text(agent, "back")
    assert second != first
    sync(one)
    assert text(agent, "back") == first
    assert sync.registry.numbers() == {"back": 1}
    sync(two)
    assert text(agent, "back") == second


def test_a_missing_adapter_is_503_while_it_should_be_there(agent: Any, sync: Any, record: MakeRecord) -> None:
    late = record("late")
    agent.call(lambda: sync.registry.expect({"late": late}))
    answer = ask(agent, "late")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")
    assert ask(agent, "never").status_code == 404
    agent.call(lambda: agent.agent.lifecycle.set_adapters(("late",)))
    assert httpx.get(f"{agent.admin_url}/ready").status_code == 200  # it was ready before
    agent.call(lambda: agent.agent.lifecycle.set_adapters(()))


def test_a_rank_above_the_limit_is_not_loaded(agent: Any, sync: Any, record: MakeRecord) -> None:
    assert sync(record("wide", rank=65)) == ("wide",)


def test_a_withdrawn_name_goes_after_a_while(agent: Any, sync: Any, record: MakeRecord, clock: Clock) -> None:
    sync(record("gone"))
    sync()
    assert text(agent, "gone")  # Redis may just have been emptied
    clock.now_s += REMOVE_AFTER_S - 1
    sync()
    assert text(agent, "gone")
    clock.now_s += 2
    sync()
    assert ask(agent, "gone").status_code == 404


def test_an_adapter_cannot_take_the_models_name(agent: Any, sync: Any, record: MakeRecord) -> None:
    before = text(agent, "base")
    assert sync(record("base", seed=5)) == ("base",)
    assert text(agent, "base") == before
