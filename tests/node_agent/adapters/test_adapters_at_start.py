"""An agent that starts where adapters are published: ready with those that load, whatever is wrong with another."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from peft_adapters import publish
from redis.asyncio import Redis

from coserve_agent.lifecycle import ADAPTERS_S, Lifecycle
from coserve_contract.connect import command
from coserve_contract.keys import Keys
from coserve_contract.messages import AdapterRecord
from coserve_contract.store import Store

ENDPOINT = "endpoint-1"


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_an_agent_is_ready_once_each_version_is_loaded_or_given_up_or_a_minute_has_passed() -> None:
    clock = Clock()
    lifecycle = Lifecycle(clock)
    assert "model" in (lifecycle.not_ready() or "")
    lifecycle.set_adapters(("slow",))
    clock.now_s = 1000.0
    lifecycle.model_loaded = True
    assert lifecycle.not_ready() == "adapters are being loaded: slow"
    clock.now_s += ADAPTERS_S - 1
    assert lifecycle.not_ready() is not None, "the minute begins when the model is loaded"
    clock.now_s += 1
    assert lifecycle.not_ready() is None
    lifecycle.set_adapters(("slow", "new"))
    assert lifecycle.not_ready() is None
    other = Lifecycle(clock)
    other.model_loaded = True
    assert other.not_ready() is not None
    other.set_adapters(("a",))
    assert other.not_ready() is not None
    other.set_adapters(())
    assert other.not_ready() is None


@pytest.fixture
def published(tmp_path: Path, model_folder: Path) -> list[AdapterRecord]:
    """Twenty adapters; of `bad` a byte was changed on the disk."""
    first = publish(tmp_path, model_folder, "a0")
    records = [first]
    for name in [*(f"a{number}" for number in range(1, 19)), "bad"]:
        path = f"adapters/{name}/v1"
        shutil.copytree(tmp_path / first.path, tmp_path / path)
        records.append(first.model_copy(update={"name": name, "path": path}))
    file = tmp_path / "adapters/bad/v1/adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    return records


@pytest.fixture
async def store(redis: Redis) -> Store:
    store = Store(redis, Keys(ENDPOINT))
    await store.set_incarnation("i")
    return store


@pytest.fixture
def connected(tmp_path: Path, redis_server: Any) -> dict[str, Any]:
    return {
        "artifacts": tmp_path,
        "redis_url": redis_server.url,
        "redis_password": redis_server.password,
        "endpoint_uid": ENDPOINT,
        "pod_uid": "p",
    }


@pytest.fixture
def start(start_agent: Callable[..., Any], connected: dict[str, Any]) -> Iterator[Callable[[], Any]]:
    started = []

    def begin() -> Any:
        started.append(start_agent(**connected))
        return started[-1]

    yield begin
    for agent in started:
        agent.stop()


def ask(agent: Any, model: str) -> httpx.Response:
    body = {"model": model, "prompt": "one two", "max_tokens": 2}
    return httpx.post(f"{agent.url}/v1/completions", json=body, timeout=60)


async def test_of_twenty_adapters_only_the_corrupt_one_is_missing_from_ready_on(
    published: list[AdapterRecord], store: Store, start: Callable[[], Any]
) -> None:
    await store.set_adapters(published)
    agent = await asyncio.to_thread(start)  # returns once /ready is 200
    answers = {one.name: await asyncio.to_thread(ask, agent, one.name) for one in published}
    assert {name: one.status_code for name, one in answers.items()} == {
        one.name: 503 if one.name == "bad" else 200 for one in published
    }
    assert int(answers["bad"].headers["retry-after"]) >= 1
    assert (await asyncio.to_thread(ask, agent, "base")).status_code == 200

    async def beat() -> Any:
        while True:
            for one in (await store.fleet()).agents.values():
                if one.pod_uid == "p" and one.ready and one.failed_adapters:  # another test's may still be there
                    return one
            await asyncio.sleep(0.05)

    said = await asyncio.wait_for(beat(), 20)
    assert said.ready
    assert len(said.adapters) == 19
    (failed,) = said.failed_adapters
    assert (failed.name, failed.number) == ("bad", 1)
    assert "checksum" in failed.reason


async def test_a_record_that_does_not_read_keeps_no_agent_from_being_ready(
    published: list[AdapterRecord], store: Store, start: Callable[[], Any], redis: Redis
) -> None:
    await store.set_adapters(published[:1])
    await command(redis, "HSET", Keys(ENDPOINT).adapters(), "odd", "{}")
    agent = await asyncio.to_thread(start)
    assert (await asyncio.to_thread(ask, agent, "a0")).status_code == 200
    assert (await asyncio.to_thread(ask, agent, "odd")).status_code == 404
