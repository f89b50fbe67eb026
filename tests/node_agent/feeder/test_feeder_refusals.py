"""A feeder refuses data that are not what was said of them, and jobs that cannot train."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from feeding import JOB, Task, accept, has, lines, prepared, read, refusal, until, write

from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.data.material import Material
from coserve_agent.errors import DatasetError
from coserve_agent.feeder import Feeder, feed
from coserve_agent.settings import FeederSettings
from coserve_contract.store import SHARD_BOUND, Store


async def test_a_changed_data_set_is_refused(
    store: Store, variables: dict[str, object], tokenizer: Tokenizer, material: Material, data: Path
) -> None:
    async with Task(store, material):
        await until(lambda: has(store, SHARD_BOUND))
    content = lines(data)
    changes: list[tuple[str, dict[str, object], str]] = [
        (content.replace("two 7", "two 8"), {}, "the data set or the tokenizer changed since the job began"),
        (content, {"learn": "Last"}, "dataset.learn.* changed since the job began"),
        (content + '{"prompt": "a", "completion": "b"}\n', {}, "changed since the job began .36 [+] 4 samples"),
    ]
    for text, changed, words in changes:
        await store.set_feed(JOB, material.status())
        write(data, text)
        settings = FeederSettings(**variables | changed)  # type: ignore[arg-type]
        await asyncio.wait_for(feed(settings, prepared(tokenizer, variables, **changed)), 20)
        assert await refusal(store, words) == "InvalidDataset"


async def test_a_feeder_that_knew_less_is_followed(store: Store, material: Material) -> None:
    """Its status has neither the rendering nor the content, which are younger."""
    old = material.status().model_copy(update={"rendering": None, "content": None, "tokens": 0, "sequences": 0})
    await store.set_feed(JOB, old)
    async with Task(store, material):
        await until(lambda: has(store, SHARD_BOUND))
        assert await store.feed(JOB) == material.status()


async def test_a_warm_up_that_never_ends_is_refused_before_the_first_step(
    store: Store, variables: dict[str, object], tokenizer: Tokenizer
) -> None:
    settings = FeederSettings(**variables, warmup_steps=48)  # type: ignore[arg-type]
    await asyncio.wait_for(feed(settings, prepared(tokenizer, variables, warmup_steps=48)), 20)
    words = "training.warmupSteps is 48, and the job has 48 steps .4 epochs of 36 samples.*; set warmupSteps below that"
    assert await refusal(store, words) == "InvalidDataset"
    assert await read(store, 0) == []


async def test_a_job_that_began_by_older_rules_goes_on(
    store: Store, variables: dict[str, object], tokenizer: Tokenizer
) -> None:
    material = prepared(tokenizer, variables, warmup_steps=48)
    await accept(store, 3)
    async with Task(store, material):
        await until(lambda: has(store, 3 + SHARD_BOUND))


async def test_a_check_refuses_what_a_feeder_refuses(
    store: Store, variables: dict[str, object], tokenizer: Tokenizer, data: Path
) -> None:
    settings = FeederSettings(**variables, mode="Check", warmup_steps=48)  # type: ignore[arg-type]
    await asyncio.wait_for(feed(settings, prepared(tokenizer, variables, warmup_steps=48)), 20)
    assert await refusal(store, "set warmupSteps below that") == "InvalidDataset"
    with pytest.raises(DatasetError, match="line 41"):
        write(data, lines(data) + "no row\n")
        prepared(tokenizer, variables, mode="Check")


async def test_what_is_fed_after_the_check_is_compared_with_it(
    store: Store, variables: dict[str, object], tokenizer: Tokenizer, material: Material, data: Path
) -> None:
    await Feeder(store, JOB, material).check()
    write(data, lines(data).replace("two 7", "two 8"))
    settings = FeederSettings(**variables)  # type: ignore[arg-type]
    await asyncio.wait_for(feed(settings, prepared(tokenizer, variables)), 20)
    assert await refusal(store, "the data set or the tokenizer changed since the job began") == "InvalidDataset"
