"""Beginning and end of the process: broken models, a dead engine. test_drain.py has SIGTERM."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from coserve_agent.chat.end_tokens import end_tokens
from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.errors import StartError

LONG = {"model": "base", "prompt": "one", "max_tokens": 250, "ignore_eos": True, "temperature": 0}


def stream(url: str, begun: threading.Event, lines: list[str], errors: list[Exception]) -> None:
    try:
        with httpx.stream("POST", f"{url}/v1/completions", json=LONG | {"stream": True}, timeout=60) as answer:
            for line in answer.iter_lines():
                if line:
                    lines.append(line)
                    begun.set()
    except httpx.HTTPError as error:
        errors.append(error)


def test_a_dead_engine_fails_its_requests_and_ends_the_agent(start_agent: Callable[..., Any]) -> None:
    agent = start_agent()
    begun, lines, errors = threading.Event(), [], []
    client = threading.Thread(target=stream, args=(agent.url, begun, lines, errors))
    client.start()
    assert begun.wait(30)
    pid = agent.call(lambda: agent.agent.engine_host.pid)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(0.2)
    waiting: list[httpx.Response] = []
    other = threading.Thread(
        target=lambda: waiting.append(httpx.post(f"{agent.url}/v1/completions", json=LONG, timeout=60))
    )
    other.start()
    time.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    client.join(30)
    other.join(30)
    assert json.loads(lines[-1][6:])["error"]["code"] == "engine_stopped"
    assert waiting[0].status_code == 500
    assert waiting[0].json()["error"]["type"] == "server_error"
    agent._thread.join(30)
    assert agent.status == 1


# ---- models that cannot be served ----


@pytest.fixture
def broken(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def rewrite(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


NO_IDS: list[object] = ["</s>", [3, None], [2.5], True, -1, float("inf")]


def ends(value: object) -> Callable[[Path], None]:
    """End tokens of generation_config.json."""
    return rewrite("generation_config.json", json.dumps({"eos_token_id": value}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shutil.rmtree, ["no such folder", "COSERVE_MODEL_PATH"]),
        (remove("tokenizer.json"), ["tokenizer.json: no such file"]),
        (rewrite("tokenizer.json", "{}"), ["tokenizer.json", "cannot be read"]),
        (rewrite("generation_config.json", "{"), ["generation_config.json", "not readable as JSON"]),
        *((ends(value), ["generation_config.json", "eos_token_id", "token id"]) for value in NO_IDS),
    ],
    ids=["folder", "no-tokenizer", "broken-tokenizer", "generation", *map(str, NO_IDS)],
)
def test_a_broken_tokenizer_is_explained(broken: Path, damage: Callable[[Path], None], words: list[str]) -> None:
    damage(broken)
    with pytest.raises(StartError) as caught:
        end_tokens(broken, Tokenizer(broken))
    assert all(word in str(caught.value) for word in [str(broken), *words]), str(caught.value)


def test_an_end_token_that_the_model_lacks(broken: Path) -> None:
    ends([3, 319])(broken)
    assert end_tokens(broken, Tokenizer(broken)) == (3, 319)
    ends([3, 320])(broken)
    with pytest.raises(StartError) as caught:
        end_tokens(broken, Tokenizer(broken))
    words = [str(broken / "generation_config.json"), "eos_token_id has 320", "vocab_size is 320", "same model"]
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove("config.json"), ["config.json"]),
        (remove("model.safetensors"), ["safetensors"]),
    ],
    ids=["no-config", "no-weights"],
)
def test_a_broken_model_ends_the_process_with_one_message(
    programs: Any, variables: dict[str, object], broken: Path, damage: Callable[[Path], None], words: list[str]
) -> None:
    damage(broken)
    program = programs.start("main", **variables | {"model_path": broken})
    assert program.process.wait(90) == 1
    (line,) = [line for line in program.log.splitlines() if "CRITICAL" in line]
    assert all(word in line for word in [str(broken), *words]), line
    assert "Traceback" not in program.log


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"device": "cuda"}, ["engine.device is cuda", "torch can use no GPU here", "template.resources.limits"]),
        ({"kv_cache_bytes": 1 << 46}, ["70,368,744,177,664", "lower engine.kvCacheMemory"]),
    ],
    ids=["device", "cache"],
)
def test_what_the_machine_has_not_ends_the_process_with_one_message(
    programs: Any, variables: dict[str, object], setting: dict[str, object], words: list[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    program = programs.start("main", **variables | setting)
    assert program.process.wait(90) == 1
    (line,) = [line for line in program.log.splitlines() if "CRITICAL" in line]
    assert all(word in line for word in words), line
    assert "Traceback" not in program.log


def test_a_wrong_variable_ends_the_process_with_one_message(programs: Any, variables: dict[str, object]) -> None:
    program = programs.start("main", **variables | {"tpot_ms": "fast"})
    assert program.process.wait(60) == 1
    assert "COSERVE_TPOT_MS is 'fast'" in program.log
    assert "Traceback" not in program.log


def test_a_port_that_is_taken_is_named(programs: Any, variables: dict[str, object], served: Any) -> None:
    program = programs.start("main", **variables | {"http_port": served.agent.http.port})
    assert program.process.wait(60) == 1
    assert f"COSERVE_HTTP_PORT is {served.agent.http.port}" in program.log
