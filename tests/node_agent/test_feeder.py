"""Shards in Redis are a function of file, seed and cursor; what cannot be used is said where the operator reads it."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from data_rows import renderer_of
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from coserve_agent.concurrency import end
from coserve_agent.data.material import Material
from coserve_agent.errors import DatasetError
from coserve_agent.feeder import Feeder, feed, room
from coserve_agent.settings import FeederSettings
from coserve_agent.tokenizer import Tokenizer
from coserve_contract.connect import command
from coserve_contract.keys import Keys
from coserve_contract.messages import Completed
from coserve_contract.shards import Shard
from coserve_contract.store import SHARD_BOUND, WINDOW_BYTES, Store

JOB = "job-1"
KEYS = Keys("endpoint-1")


@pytest.fixture
def store(redis: Redis) -> Store:
    return Store(redis, KEYS)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"one {n}", "completion": f" two {n}"} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def variables(redis_server: Any, data: Path, model_folder: Path) -> dict[str, object]:
    return {
        "redis_url": redis_server.url,
        "redis_password": redis_server.password,
        "endpoint_uid": KEYS.endpoint_uid,
        "job_uid": JOB,
        "job_name": "job",
        "dataset_path": data,
        "dataset_root": data.parent,
        "model_path": model_folder,
        "eval_percent": 10,
        "max_sequence_length": 64,
        "batch_size": 3,
        "epochs": 4,
        "seed": 1,
    }


@pytest.fixture
def material(variables: dict[str, object], tokenizer: Tokenizer) -> Material:
    return prepared(tokenizer, variables)


def prepared(tokenizer: Tokenizer, variables: dict[str, object], **changes: object) -> Material:
    settings = FeederSettings(**variables | changes)  # type: ignore[arg-type]
    return Material.prepare(settings, renderer_of(tokenizer), tokenizer.size)


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.02)


def lines(path: Path) -> str:
    return path.read_text()


def write(path: Path, text: str | None) -> None:
    """None is no file at all."""
    path.unlink()
    if text is not None:
        path.write_text(text)


async def accept(store: Store, cursor: int) -> None:
    """What the accept script leaves."""
    checkpoint = {
        "version": 1,
        "step": cursor,
        "cursor": cursor,
        "epoch": 1,
        "path": "jobs/x/e1/s1",
        "sha256": "0" * 64,
    }
    await command(store.redis, "SET", KEYS.checkpoint(JOB), json.dumps(checkpoint))
    await command(store.redis, "XTRIM", KEYS.shards(JOB), "MINID", f"{cursor + 1}-0")


async def read(store: Store, after: int, count: int = 100) -> list[Shard]:
    return await store.read_shards(JOB, after, count)


class Task:
    """A running feeder."""

    def __init__(self, store: Store, material: Material) -> None:
        self.task = asyncio.create_task(Feeder(store, JOB, material).run())

    async def __aenter__(self) -> asyncio.Task[None]:
        return self.task

    async def __aexit__(self, *error: object) -> None:
        await end(self.task)


async def test_shards_are_pushed_up_to_the_bound_and_follow_the_cursor(store: Store, material: Material) -> None:
    async with Task(store, material) as task:
        await until(lambda: has(store, SHARD_BOUND))
        status = await store.feed(JOB)
        assert status == material.status()
        assert (status.total_steps, status.samples, status.eval_samples, status.eval_shards) == (48, 36, 4, 2)
        assert (status.digest, status.finished) == (material.digest, False)
        assert len(await read(store, 0)) == SHARD_BOUND
        held_out = {sample.id for shard in await store.read_eval(JOB) for sample in shard.samples}
        assert len(held_out) == 4
        first = await read(store, 0)
        await accept(store, 20)
        await until(lambda: has(store, 48))
        await until(lambda: finished(store))
        rest = await read(store, 20)
        shards = {shard.seq: shard for shard in [*first, *rest]}
        assert sorted(shards) == list(range(1, 49))
        assert all(shards[number] == material.shard(number) for number in shards)
        for epoch in range(4):
            ids = [sample.id for shard in shards.values() if shard.epoch == epoch for sample in shard.samples]
            assert len(ids) == len(set(ids)) == 36
            assert not held_out & set(ids)
        assert not task.done()
        await command(store.redis, "SET", KEYS.result(JOB), Completed(epoch=1, step=48).dumps())
        await asyncio.wait_for(task, 10)


async def has(store: Store, last: int) -> bool:
    return (await store.job(JOB)).last_shard == last


async def finished(store: Store) -> bool:
    status = await store.feed(JOB)
    return status is not None and status.finished


@given(st.lists(st.integers(1, 3 * WINDOW_BYTES // 2), max_size=80), st.integers(0, 80))
def test_what_is_ahead_of_the_reader_is_bounded_by_count_and_bytes(sizes: list[int], read: int) -> None:
    read = min(read, len(sizes))
    last = room(read, len(sizes), lambda number: sizes[number - 1])
    ahead = sizes[read:last]
    assert len(ahead) <= SHARD_BOUND
    assert sum(ahead) <= WINDOW_BYTES or len(ahead) == 1
    more = sizes[read : last + 1]
    full = last == len(sizes) or len(more) > SHARD_BOUND or sum(more) > WINDOW_BYTES
    assert full, "it stops no earlier"
    assert last > read or read == len(sizes), "a job never stands still"


async def test_large_shards_are_fewer_in_both_streams(
    store: Store, variables: dict[str, object], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    material = prepared(tokenizer, variables, eval_percent=40)
    most = max(map(material.shard_bytes, range(1, 10)))
    monkeypatch.setattr("coserve_agent.feeder.WINDOW_BYTES", 3 * most)
    async with Task(store, material):
        await until(lambda: has(store, 3))
        await asyncio.sleep(1)
        assert 3 <= (await store.job(JOB)).last_shard <= 4
        assert 1 <= len(await store.read_eval(JOB, 0, 99)) <= 4
        await accept(store, 20)
        await until(lambda: has(store, 23))


async def test_500_queued_jobs_of_400_000_rows_are_a_few_kb_each(store: Store, material: Material) -> None:
    status = material.status().model_copy(
        update={"samples": 380_000, "eval_samples": 20_000, "eval_shards": 2_500, "total_steps": 47_500}
    )
    for number in range(500):
        feeder = Feeder(store, f"job-{number}", material)
        feeder._status = status
        await feeder.check()
    keys = await command(store.redis, "KEYS", "*:job:job-*")
    assert len(keys) == 500
    assert sum([await command(store.redis, "MEMORY", "USAGE", key) for key in keys]) < 500 * 4096


async def test_a_restarted_feeder_goes_on_where_the_stream_ends(store: Store, material: Material) -> None:
    async with Task(store, material):
        await until(lambda: has(store, SHARD_BOUND))
    before = await read(store, 0)
    await accept(store, 10)
    async with Task(store, material):
        await until(lambda: has(store, 42))
    assert await read(store, 10) == [*before[10:], *(material.shard(number) for number in range(33, 43))]


async def test_an_emptied_redis_is_filled_again_from_the_cursor(store: Store, material: Material) -> None:
    await store.set_incarnation("first")
    async with Task(store, material):
        await until(lambda: has(store, SHARD_BOUND))
        before = await read(store, 0)
        held_out = await store.read_eval(JOB)
        await command(store.redis, "FLUSHALL")
        await accept(store, 5)
        await store.set_incarnation("second")
        await until(lambda: has(store, 5 + SHARD_BOUND), 30)
        assert (await read(store, 5))[: SHARD_BOUND - 5] == before[5:]
        await until(lambda: same_eval(store, held_out))
        assert await store.feed(JOB) is not None


async def same_eval(store: Store, expected: list[Shard]) -> bool:
    return await store.read_eval(JOB) == expected


async def test_a_deleted_job_is_left_alone(store: Store, material: Material) -> None:
    await store.set_incarnation("first")
    async with Task(store, material) as task:
        await until(lambda: has(store, SHARD_BOUND))
        await store.delete_job(JOB)
        await asyncio.wait_for(task, 10)
        assert await store.feed(JOB) is None


async def test_two_machines_make_the_same_shards(
    variables: dict[str, object], model_folder: Path, material: Material
) -> None:
    again, other = (prepared(Tokenizer(model_folder), variables, seed=seed) for seed in (1, 2))
    numbers = range(1, 49)
    assert [again.shard(n) for n in numbers] == [material.shard(n) for n in numbers]
    assert [other.shard(n) for n in numbers] != [material.shard(n) for n in numbers]
    assert again.eval_shard(1) == material.eval_shard(1)


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


async def refusal(store: Store, words: str) -> str:
    """The reason of what the feeder says, in words like these."""
    status = await store.feed(JOB)
    assert status is not None
    assert status.error is not None
    assert re.search(words, status.error.message), status.error.message
    return status.error.reason


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


# ---- the program ----


@pytest.mark.parametrize(
    ("content", "reason", "line"),
    [
        (None, "DatasetNotFound", None),
        ('{"text": "one"}\n{"text": 5}\n', "InvalidDataset", 2),
        ("", "InvalidDataset", None),
        ('{"text": "one"}\n', "InvalidDataset", None),
        ('{"text": "one"}\n"x \\ud83d"\n', "InvalidDataset", 2),
        ('{"text": "one"}\n{"x \\ud83d": 1}\n', "InvalidDataset", 2),
        ('{"text": "one \\ud83d"}\n', "InvalidDataset", 1),
    ],
)
async def test_the_program_says_what_is_wrong_with_the_data(
    store: Store,
    programs: Any,
    variables: dict[str, object],
    data: Path,
    content: str | None,
    reason: str,
    line: int | None,
) -> None:
    write(data, content)
    program = programs.start("feeder", **variables)
    assert await asyncio.to_thread(program.process.wait, 60) == 0
    status = await store.feed(JOB)
    assert status is not None
    assert status.error is not None
    assert (status.error.reason, status.error.line) == (reason, line)
    assert str(data) in status.error.message


async def test_the_program_feeds_and_ends_quickly_when_told(
    store: Store, programs: Any, variables: dict[str, object], material: Material
) -> None:
    program = programs.start("feeder", **variables)
    await until(lambda: has(store, SHARD_BOUND), 60)
    assert await read(store, 0, 1) == [material.shard(1)]
    begun = time.monotonic()
    assert await asyncio.to_thread(program.terminate, 10) == 143
    assert time.monotonic() - begun < 5


def test_the_feeder_needs_no_torch(model_folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import coserve_agent.feeder;"
        "from coserve_agent.tokenizer import Tokenizer;"
        f"t = Tokenizer(Path({str(model_folder)!r})); t.encode_chat([{{'role': 'assistant', 'content': 'x'}}]);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_a_broken_model_folder_is_explained(programs: Any, variables: dict[str, object], tmp_path: Path) -> None:
    program = programs.start("feeder", **variables | {"model_path": tmp_path})
    assert program.process.wait(60) == 1
    assert f"{tmp_path}/tokenizer.json: no such file" in program.log


def test_one_line_cannot_be_held_out(variables: dict[str, object], tokenizer: Tokenizer, data: Path) -> None:
    write(data, '{"text": "one"}\n')
    with pytest.raises(DatasetError, match=r"of 1 usable lines none .* dataset.evalPercent is 10; add lines"):
        prepared(tokenizer, variables)
    alone = prepared(tokenizer, variables, eval_percent=0)
    assert alone.status().samples == 1


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    path = tmp_path / "held-out.jsonl"
    path.write_text("".join(json.dumps({"text": f"held out {n}"}) + "\n" for n in range(9)))
    return path


def prepare(variables: dict[str, object], tokenizer: Tokenizer, **changes: object) -> Material:
    return prepared(tokenizer, variables, eval_root=variables["dataset_root"], **changes)


def evaluated(material: Material) -> list[int]:
    return [one.id for n in range(1, material.eval_shards + 1) for one in material.eval_shard(n).samples]


def test_held_out_samples_of_a_file_of_their_own(
    variables: dict[str, object], tokenizer: Tokenizer, held_out: Path
) -> None:
    """All lines of the data set are trained on, as without an evaluation, and the format of each file is its own."""
    material = prepare(variables, tokenizer, eval_percent=0, eval_path=held_out)
    status = material.status()
    assert (status.samples, status.eval_samples, status.eval_shards) == (40, 9, 3)
    assert evaluated(material) == list(range(1, 10))
    text = tokenizer.decode(material.eval_shard(1).samples[0].tokens)
    assert text == "held out 0"
    alone = prepare(variables, tokenizer, eval_percent=0)
    assert material.shard(5) == alone.shard(5)
    assert alone.status().eval_samples == 0


def test_a_cap_takes_the_same_samples_each_time(
    variables: dict[str, object], tokenizer: Tokenizer, held_out: Path
) -> None:
    """What it leaves out stays held out: the cap changes no training shard."""
    whole = prepare(variables, tokenizer)
    some = prepare(variables, tokenizer, eval_max_samples=2)
    assert set(evaluated(some)) < set(evaluated(whole))
    assert (len(evaluated(whole)), len(evaluated(some)), some.eval_shards) == (4, 2, 1)
    assert some.shard(1) == whole.shard(1)
    assert evaluated(prepare(variables, tokenizer, eval_max_samples=2)) == evaluated(some)
    assert evaluated(prepare(variables, tokenizer, eval_max_samples=99)) == evaluated(whole)
    own = {"eval_percent": 0, "eval_path": held_out}
    assert len(evaluated(prepare(variables, tokenizer, eval_max_samples=5, **own))) == 5


def test_a_bad_line_of_the_held_out_file_is_named_with_it(
    variables: dict[str, object], tokenizer: Tokenizer, held_out: Path
) -> None:
    held_out.write_text(held_out.read_text() + "{}\n")
    with pytest.raises(DatasetError, match=r"held-out.jsonl, line 10: "):
        prepare(variables, tokenizer, eval_percent=0, eval_path=held_out)
    skipping = prepare(variables, tokenizer, eval_percent=0, eval_path=held_out, on_invalid="Skip")
    assert (skipping.status().skipped_lines, skipping.status().eval_samples) == (1, 9)
    held_out.unlink()
    with pytest.raises(DatasetError, match=r"held-out.jsonl: no such file"):
        prepare(variables, tokenizer, eval_percent=0, eval_path=held_out)


@pytest.mark.parametrize("policy", ["Skip", "Fail"])
async def test_nothing_of_the_rows_is_in_what_the_program_says(
    store: Store, programs: Any, variables: dict[str, object], data: Path, policy: str
) -> None:
    secret = "zq7secret"
    rows = [
        {"prompt": secret, "completion": "two", f"{secret} of somebody": 1, "note": secret},
        {"prompt": "one", "completion": [secret]},
        {"prompt": "one", "completion": "two", "tools": f"{secret} {{"},
        {"messages": [{"role": secret, "content": secret}]},
    ]
    write(data, lines(data) + "".join(json.dumps(row) + "\n" for row in rows) + f'{{"{secret}\n')
    program = programs.start("feeder", **variables, mode="Check", on_invalid=policy)
    assert await asyncio.to_thread(program.process.wait, 60) == 0
    said = await store.feed(JOB)
    assert said is not None
    if policy == "Skip":
        assert (said.skipped_lines, said.unknown_fields) == (4, {"(other names)": 1, "note": 1})
        assert said.refusals[0].message.startswith("prompt and completion are a string and a list")
    else:
        assert said.error is not None
        assert said.error.line == 42
    assert secret not in said.dumps()
    assert secret not in program.log


# ---- the check of a job that waits ----


async def test_a_check_says_what_the_data_are_and_ends_without_a_shard(
    store: Store, programs: Any, variables: dict[str, object], material: Material
) -> None:
    program = programs.start("feeder", **variables, mode="Check")
    assert await asyncio.to_thread(program.process.wait, 60) == 0
    assert await store.feed(JOB) == material.status()
    assert await read(store, 0) == await store.read_eval(JOB) == []


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
