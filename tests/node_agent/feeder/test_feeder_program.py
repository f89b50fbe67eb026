"""The feeder as a process: what cannot be used is said where the operator reads it, and how it ends."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from feeding import JOB, has, lines, read, until, write

from coserve_agent.data.material import Material
from coserve_contract.store import SHARD_BOUND, Store


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
        "from coserve_agent.chat.tokenizer import Tokenizer;"
        f"t = Tokenizer(Path({str(model_folder)!r})); t.encode_chat([{{'role': 'assistant', 'content': 'x'}}]);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_a_broken_model_folder_is_explained(programs: Any, variables: dict[str, object], tmp_path: Path) -> None:
    program = programs.start("feeder", **variables | {"model_path": tmp_path})
    assert program.process.wait(60) == 1
    assert f"{tmp_path}/tokenizer.json: no such file" in program.log


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


async def test_a_check_says_what_the_data_are_and_ends_without_a_shard(
    store: Store, programs: Any, variables: dict[str, object], material: Material
) -> None:
    program = programs.start("feeder", **variables, mode="Check")
    assert await asyncio.to_thread(program.process.wait, 60) == 0
    assert await store.feed(JOB) == material.status()
    assert await read(store, 0) == await store.read_eval(JOB) == []
