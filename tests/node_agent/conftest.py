"""A small random model with its own tokenizer, and real agents on it: in a thread for HTTP tests, as processes to be
killed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from coserve_agent.agent import Agent
from coserve_agent.settings import AgentSettings
from coserve_agent.tokenizer import Tokenizer

CONTEXT = 256
SPECIAL = ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>")
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}<|end|>"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|end|>"
    "{% else %}{{ raise_exception('no role ' ~ message['role']) }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED_TEMPLATE = PLAIN_TEMPLATE.replace(
    "<|assistant|>{{ message['content'] }}<|end|>",
    "<|assistant|>{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}",
)
TEXTS = ["the quick brown fox jumps over the lazy dog", "héllo wörld 你好 😀", "one two three four five six seven"]
START_S = 180.0


def write_tokenizer(folder: Path, template: str) -> int:
    """A byte-level BPE of some 300 tokens; returns its size."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[3],
        "pad_token": SPECIAL[0],
        "additional_special_tokens": list(SPECIAL[1:3]),
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return int(backend.get_vocab_size())


BEGIN, END = "<s>", "</s>"
INSTRUCT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} "
    "[/INST]{% else %} {{ message['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)


def write_sentencepiece(folder: Path, template: str = INSTRUCT_TEMPLATE) -> int:
    """A tokenizer like Llama 2's: spaces are part of words, the decoder strips the one before the first word, and
    what has no token is spelt in bytes.
    """
    to_pieces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = Backend(models.BPE(unk_token="<unk>"))
    trained.normalizer = to_pieces
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog", "one two three four five six seven", "hello world [INST] é"]
        * 3,
        trainers.BpeTrainer(vocab_size=160, special_tokens=["<unk>"], show_progress=False),
    )
    learnt = json.loads(trained.to_str())["model"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    words = [piece for piece, _ in sorted(learnt["vocab"].items(), key=lambda item: item[1]) if piece != "<unk>"]
    vocab = {piece: n for n, piece in enumerate(["<unk>", BEGIN, END, *bytes_, *words])}
    merges = [tuple(pair) for pair in learnt["merges"]]
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = to_pieces
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", BEGIN, END])
    backend.post_processor = processors.TemplateProcessing(f"{BEGIN} $A", f"{BEGIN} $A {BEGIN} $B", [(BEGIN, 1)])
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return int(backend.get_vocab_size())


def write_model(
    folder: Path,
    template: str = MARKED_TEMPLATE,
    write: Callable[[Path, str], int] = write_tokenizer,
    eos_token_id: int = 3,
) -> Path:
    size = write(folder, template)
    torch.manual_seed(7)
    transformers_logging.disable_progress_bar()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            initializer_range=0.15,
            eos_token_id=eos_token_id,
            pad_token_id=0,
            bos_token_id=None,
            tie_word_embeddings=False,
        )
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tokenizer(model_folder: Path) -> Tokenizer:
    return Tokenizer(model_folder)


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose tokenizer is like Llama 2's."""
    return write_model(tmp_path_factory.mktemp("sentencepiece"), INSTRUCT_TEMPLATE, write_sentencepiece, 2)


@pytest.fixture(scope="session")
def sentencepiece_tokenizer(sentencepiece: Path) -> Tokenizer:
    return Tokenizer(sentencepiece)


@pytest.fixture(scope="session")
def plain_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The same tokenizer, its chat template without {% generation %}."""
    folder = tmp_path_factory.mktemp("plain")
    write_tokenizer(folder, PLAIN_TEMPLATE)
    return Tokenizer(folder)


# ---- an agent in a thread ----


class AgentThread:
    """An agent with a loop of its own; `agent` may be looked at, and changed through `call`."""

    def __init__(self, settings: AgentSettings) -> None:
        self._settings = settings
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._main, name="agent")
        self.failure: BaseException | None = None
        self.status: int | None = None
        self.agent: Agent
        self.loop: asyncio.AbstractEventLoop

    def _main(self) -> None:
        async def run() -> int:
            self.loop = asyncio.get_running_loop()
            try:
                self.agent = Agent(self._settings)
            finally:
                self._started.set()
            return await self.agent.run()

        try:
            self.status = asyncio.run(run())
        except BaseException as error:
            self.failure = error

    def start(self) -> AgentThread:
        self._thread.start()
        self._started.wait()
        deadline = time.monotonic() + START_S
        while self.failure is None:
            try:
                if httpx.get(f"{self.admin_url}/ready").status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            if time.monotonic() > deadline:
                raise TimeoutError("the agent did not become ready")
            time.sleep(0.05)
        raise self.failure

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.agent.http.port}"

    @property
    def admin_url(self) -> str:
        return f"http://127.0.0.1:{self.agent.admin.port}"

    def call(self, function: Callable[[], Any]) -> Any:
        """The result of `function` in the agent's loop."""

        async def run() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(10)

    def stop(self) -> None:
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.agent.stop)
        self._thread.join(60)
        assert not self._thread.is_alive()


@pytest.fixture(scope="session")
def settings(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., AgentSettings]:
    def make(**changes: Any) -> AgentSettings:
        values: dict[str, Any] = {
            "model_path": model_folder,
            "model_name": "base",
            "max_model_length": CONTEXT,
            "host": "127.0.0.1",
            "http_port": 0,
            "admin_port": 0,
            "kv_cache_bytes": 16 << 20,
            "artifacts": tmp_path_factory.mktemp("artifacts"),
            "drain_s": 0,
        }
        return AgentSettings(**values | changes)

    return make


@pytest.fixture(scope="session")
def start_agent(settings: Callable[..., AgentSettings]) -> Iterator[Callable[..., AgentThread]]:
    """Start an agent in a thread; all are stopped at the end."""
    started: list[AgentThread] = []

    def start(**changes: Any) -> AgentThread:
        started.append(AgentThread(settings(**changes)))
        return started[-1].start()

    yield start
    for one in started:
        one.stop()


@pytest.fixture(scope="session")
def served(start_agent: Callable[..., AgentThread]) -> AgentThread:
    """One agent without Redis that all HTTP tests share."""
    return start_agent()


@pytest.fixture
def client(served: AgentThread) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def http(served: AgentThread) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=60) as client:
        yield client


# ---- programs ----


@dataclass
class Program:
    """`python -m MODULE` with COSERVE_ variables; its log goes to a file. `id` is the test's to set."""

    process: subprocess.Popen[bytes]
    log_file: Path
    variables: dict[str, object]
    id: str = ""
    _log_from: int = 0

    @property
    def log(self) -> str:
        return self.log_file.read_bytes()[self._log_from :].decode(errors="replace")

    @property
    def whole_log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def forget_log(self) -> None:
        """From now on `log` is what comes."""
        self._log_from = self.log_file.stat().st_size

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(20)

    def terminate(self, timeout_s: float = 60) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)


@dataclass
class Programs:
    """Starts programs of coserve_agent."""

    folder: Path
    running: list[Program] = field(default_factory=list)

    def start(self, module: str, **variables: object) -> Program:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("COSERVE_")}
        environment |= {f"COSERVE_{key.upper()}": str(value) for key, value in variables.items()}
        log_file = self.folder / f"{module}-{len(self.running)}.log"
        with log_file.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", f"coserve_agent.{module}"], env=environment, stdout=output, stderr=output
            )
        self.running.append(Program(process, log_file, variables))
        return self.running[-1]


@contextmanager
def running_programs(folder: Path) -> Iterator[Programs]:
    made = Programs(folder)
    yield made
    for one in made.running:
        if one.process.poll() is None:
            one.kill()


@pytest.fixture(scope="session")
def start_programs() -> Callable[[Path], AbstractContextManager[Programs]]:
    """Programs for a longer time than a test; none outlives the `with` block."""
    return running_programs


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    """Programs for one test."""
    with running_programs(tmp_path) as made:
        yield made


@pytest.fixture
def variables(model_folder: Path, tmp_path: Path) -> dict[str, object]:
    """Of an agent process that serves the small model, without Redis."""
    return {
        "model_path": model_folder,
        "model_name": "base",
        "max_model_length": CONTEXT,
        "host": "127.0.0.1",
        "http_port": 0,
        "admin_port": 0,
        "kv_cache_bytes": 16 << 20,
        "artifacts": tmp_path,
    }


@dataclass
class AgentProcess:
    """An agent process that is ready, and the URLs of its two ports."""

    program: Program
    url: str
    admin_url: str


@pytest.fixture
def start_processes(programs: Programs, variables: dict[str, object]) -> Callable[..., list[AgentProcess]]:
    """Start agent processes, one for each given change of `variables`, and wait until all are ready."""

    def start(*changes: dict[str, object]) -> list[AgentProcess]:
        started = [programs.start("main", **variables | one) for one in changes]
        return [_when_ready(one) for one in started]

    return start


def _when_ready(program: Program) -> AgentProcess:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert program.process.poll() is None, program.log
        ports = re.search(r"http port (\d+), admin port (\d+)", program.log)
        if ports is not None:
            made = AgentProcess(program, *(f"http://127.0.0.1:{port}" for port in ports.groups()))
            if httpx.get(f"{made.admin_url}/ready").status_code == 200:
                return made
        time.sleep(0.1)
    raise TimeoutError(program.log)


@pytest.fixture(autouse=True, scope="session")
def _quiet_logs() -> None:
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
