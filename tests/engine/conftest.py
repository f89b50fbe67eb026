"""Small random models on disk, an executor driven segment by segment, an engine driven to its end, and PEFT."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_driver import Driver, FakeClock
from engine_rig import Rig
from peft import LoraConfig, PeftModel
from peft_reference import Reference, wrap_in_peft
from random_models import MODELS, PLAIN, Adapter, draw_adapter, draw_sequence
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.utils import logging as transformers_logging

from coserve_engine.config import LINEARS, EngineConfig
from coserve_engine.engine import Engine
from coserve_engine.host import set_environment
from coserve_engine.layout.masks import TokenMasks
from coserve_engine.messages import (
    Command,
    ForwardBackward,
    LoraSpec,
    OptimStep,
    Pass,
    PassMode,
    StartJob,
    TrainSeq,
)
from coserve_engine.model.executor import Executor, Forwarded
from coserve_engine.model.outcome import Sampled


@pytest.fixture(scope="session", autouse=True)
def _as_an_engines_process() -> None:
    set_environment()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()


@pytest.fixture(scope="session")
def save_model() -> Callable[..., None]:
    """Write a random model of PLAIN's fields but for those given; its `model_type` says which architecture.

    Weights and biases are large enough, and norms uneven enough, for a mistake to show.
    """

    def save(folder: Path, seed: int = 0, **fields: Any) -> None:
        config = AutoConfig.for_model(**{**PLAIN, **fields})
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for key, value in model.named_parameters():
                if "norm" in key or "bias" in key:
                    value.add_(0.2 * torch.randn_like(value))
        model.save_pretrained(folder)

    return save


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory, save_model: Callable[..., None]) -> Callable[[str], str]:
    """Folder of one of MODELS."""
    made: dict[str, str] = {}

    def make(name: str = "plain") -> str:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            save_model(folder, len(made), **MODELS[name])
            made[name] = str(folder)
        return made[name]

    return make


@pytest.fixture(scope="session")
def plain(model_path: Callable[[str], str]) -> str:
    return model_path("plain")


@pytest.fixture
def float64_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers computes RMSNorm in float32; here in the dtype of its input."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    for norm in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(norm, "forward", forward)


# ---- adapters ----


@pytest.fixture(scope="session")
def random_adapter() -> Callable[..., Adapter]:
    return draw_adapter


@pytest.fixture(scope="session")
def peft_model() -> Callable[[PreTrainedModel, LoraConfig], PeftModel]:
    return wrap_in_peft


@pytest.fixture(scope="session")
def reference() -> Callable[[Executor, Adapter], Reference]:
    """PEFT's model of the executor's folder with the adapter's weights."""

    def make(executor: Executor, adapter: Adapter) -> Reference:
        return Reference.of(executor.config.model_path, executor.dtype, adapter)

    return make


# ---- an executor, segment by segment ----


@pytest.fixture(scope="session")
def rig(plain: str) -> Callable[..., Rig]:
    """A rig on a fresh executor; the model is `plain` unless named."""

    def make(path: str | None = None, **settings: Any) -> Rig:
        config = {"max_model_length": 512, "kv_cache_bytes": 4 << 20, "threads": 1, **settings}
        return Rig(Executor(EngineConfig(path or plain, **config)))

    return make


# ---- an engine, driven to its end ----


@pytest.fixture(scope="session")
def driver(plain: str) -> Callable[..., Driver]:
    """A driver of a fresh engine; the model is `plain` unless named, the clock stands still unless it jitters."""

    def make(path: str | None = None, jitter_s: float = 0.0, seed: int = 0, **settings: Any) -> Driver:
        clock = FakeClock(jitter_s, seed)
        config = {"max_model_length": 256, "kv_cache_bytes": 2 << 20, "threads": 1, **settings}
        return Driver(Engine(EngineConfig(path or plain, **config), clock), clock)

    return make


@pytest.fixture
def sampled_logits(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Every row of logits that an engine samples from, one for each token that it says."""
    rows: list[torch.Tensor] = []
    sample = Executor.sample

    def spy(executor: Executor, forwarded: Forwarded, masks: TokenMasks | None = None) -> Sampled:
        rows.extend(forwarded.logits.clone())
        return sample(executor, forwarded, masks)

    monkeypatch.setattr(Executor, "sample", spy)
    return rows


# ---- data ----


@pytest.fixture(scope="session")
def draw_tokens() -> Callable[[int, int], tuple[int, ...]]:
    """`count` tokens of the small vocabulary, never its end-of-text."""

    return draw_sequence


@pytest.fixture(scope="session")
def training(draw_tokens: Callable[[int, int], tuple[int, ...]]) -> Callable[..., list[Command]]:
    """Commands of a small job: `steps` optimizer steps of `micros` passes with one to three sequences each.

    Numbering begins after `seq_no`; passes are numbered from `first_pass`.
    """

    def make(
        job: str = "job", seed: int = 0, steps: int = 3, micros: int = 2, lr: float = 1e-2, first_pass: int = 0
    ) -> list[Command]:
        source, commands, seq_no = random.Random(seed), [], 0
        for step in range(steps):
            for micro in range(micros):
                seqs = []
                for uid in range(source.randint(1, 3)):
                    length = source.randint(5, 150)
                    weights = tuple(float(source.random() < 0.8) / 300 for _ in range(length))
                    seqs.append(TrainSeq(uid, draw_tokens(source.randrange(1 << 30), length), weights))
                seq_no += 1
                work = Pass(first_pass + seq_no, job, step, micro, tuple(seqs), PassMode.TRAIN)
                commands.append(ForwardBackward(job, seq_no, work))
            seq_no += 1
            commands.append(OptimStep(job, seq_no, lr))
        return commands

    return make


@pytest.fixture(scope="session")
def start_job() -> Callable[..., StartJob]:
    """The command that goes before `training`."""

    def make(job: str = "job", rank: int = 4, seed: int = 1, resume: str | None = None) -> StartJob:
        return StartJob(job, LoraSpec(rank, 2.0 * rank, LINEARS), seed, resume)

    return make
