"""Small random models on disk, an executor driven segment by segment, an engine driven to its end, and PEFT."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.utils import logging as transformers_logging

from coserve_engine import serving
from coserve_engine.batch import SequenceRows
from coserve_engine.config import LINEARS, EngineConfig
from coserve_engine.engine import Engine
from coserve_engine.executor import Executor
from coserve_engine.lora import LoraLayout, LoraWeights
from coserve_engine.messages import (
    Command,
    Event,
    ForwardBackward,
    JobFailed,
    LoraSpec,
    OptimStep,
    Pass,
    PassMode,
    RequestFailed,
    StartJob,
    TokenBatch,
    TrainSeq,
)
from coserve_engine.passes import PassState, pages_of_pass
from coserve_engine.plan import Kind, Segment, Unit
from coserve_engine.sampling import Choice

E = TypeVar("E")
VOCAB = 128
PLAIN: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
    "initializer_range": 0.12,
    "eos_token_id": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "wide": {"head_dim": 32, "num_key_value_heads": 1},
    "llama31": {
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral": {"model_type": "mistral", "head_dim": 24, "sliding_window": 50},
    "qwen2": {
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 70,
        "max_window_layers": 1,
    },
    "qwen3": {
        "model_type": "qwen3",
        "head_dim": 32,
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    },
    "smol": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
        "initializer_range": 0.04,
    },
}
"""plain: grouped queries, a head of its own; wide: heads * head size is not the hidden size; llama31: biases, stretched
rotary embedding; mistral: windows shorter than a tile; qwen2: biases of q, k, v, a window in the second layer only;
qwen3: norms of queries and keys; smol: real widths.
"""


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
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


@dataclass(frozen=True)
class Adapter:
    """Random LoRA weights as the engine sees them."""

    layout: LoraLayout
    flat: torch.Tensor

    @property
    def weights(self) -> LoraWeights:
        return LoraWeights(self.layout.spec.scale, self.layout.views(self.flat))


@pytest.fixture(scope="session")
def random_adapter() -> Callable[..., Adapter]:
    def make(executor: Executor, rank: int = 4, seed: int = 0, targets: tuple[str, ...] = LINEARS) -> Adapter:
        layout = executor.layout(LoraSpec(rank, 2.0 * rank, targets))
        flat = layout.fresh(seed, executor.dtype, executor.device)
        generator = torch.Generator().manual_seed(seed)
        for layer in layout.views(flat):
            for _, b in layer.values():
                b[:, :rank] = 0.1 * torch.randn(b.shape[0], rank, generator=generator)
        return Adapter(layout, flat)

    return make


def wrap_in_peft(base: PreTrainedModel, config: LoraConfig) -> PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(base, config, autocast_adapter_dtype=False)


@pytest.fixture(scope="session")
def peft_model() -> Callable[[PreTrainedModel, LoraConfig], PeftModel]:
    return wrap_in_peft


def _peft_name(layer: int, name: str, part: str) -> str:
    block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    return f"base_model.model.model.layers.{layer}.{block}.{name}.lora_{part}.default.weight"


@dataclass(frozen=True)
class Reference:
    """A PEFT model with the weights of an Adapter."""

    model: PeftModel
    adapter: Adapter

    def set_weights(self) -> None:
        rank, parameters = self.adapter.layout.spec.rank, dict(self.model.named_parameters())
        with torch.no_grad():
            for index, layer in enumerate(self.adapter.layout.views(self.adapter.flat)):
                for name, (a, b) in layer.items():
                    parameters[_peft_name(index, name, "A")].copy_(a[:rank])
                    parameters[_peft_name(index, name, "B")].copy_(b[:, :rank])

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        with torch.no_grad():
            return self.model(torch.tensor([tokens])).logits[0]

    def gradients(self, seqs: Iterable[TrainSeq]) -> tuple[float, torch.Tensor]:
        """Loss and gradient, in the layout of the adapter's flat buffer."""
        total = torch.zeros((), dtype=self.adapter.flat.dtype)
        for seq in seqs:
            logp = torch.log_softmax(self.model(torch.tensor([seq.tokens])).logits[0, :-1], -1)
            picked = logp.gather(1, torch.tensor(seq.tokens[1:]).unsqueeze(1)).squeeze(1)
            total = total - (picked * torch.tensor(seq.weights[1:], dtype=picked.dtype)).sum()
        total.backward()
        layout, parameters = self.adapter.layout, dict(self.model.named_parameters())
        flat = torch.zeros_like(self.adapter.flat)
        for index, layer in enumerate(layout.views(flat)):
            for name, (a, b) in layer.items():
                a[: layout.spec.rank] = parameters[_peft_name(index, name, "A")].grad
                b[:, : layout.spec.rank] = parameters[_peft_name(index, name, "B")].grad
        return total.item(), flat


@pytest.fixture(scope="session")
def reference() -> Callable[[Executor, Adapter], Reference]:
    """PEFT's model of the executor's folder with the adapter's weights."""

    def make(executor: Executor, adapter: Adapter) -> Reference:
        spec = adapter.layout.spec
        base = AutoModelForCausalLM.from_pretrained(executor.config.model_path, dtype=executor.dtype)
        config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=list(spec.targets), lora_dropout=0.0)
        made = Reference(wrap_in_peft(base, config), adapter)
        made.set_weights()
        return made

    return make


# ---- an executor, segment by segment ----


@dataclass
class Rig:
    """An executor and the sequences in its cache."""

    executor: Executor
    sequences: dict[int, SequenceRows] = field(default_factory=dict)

    def add(self, tokens: Sequence[int], adapter: Adapter | None = None) -> int:
        """Reserve pages for a sequence; returns its slot."""
        slot = len(self.sequences) + 1
        pages = self.executor.ledger.reserve(f"request:{slot}", self.executor.numerics.pages(len(tokens)))
        self.sequences[slot] = SequenceRows(tuple(tokens), pages, adapter.weights if adapter else None)
        return slot

    def clear(self) -> None:
        for slot in self.sequences:
            self.executor.ledger.free(f"request:{slot}")
        self.sequences.clear()

    def forward(self, *segments: Segment) -> dict[int, torch.Tensor]:
        forwarded = self.executor.forward(segments, self.sequences)
        return dict(zip(forwarded.slots, forwarded.logits, strict=True))

    def rows(
        self, slot: int, sizes: Iterable[int], start: int = 0, beside: Callable[[], Sequence[Segment]] = tuple
    ) -> dict[int, torch.Tensor]:
        """Chunks of these sizes one after another, size 1 as decode: logits at the last position of each."""
        seen = {}
        for size in sizes:
            kind = Kind.DECODE if size == 1 else Kind.PREFILL
            logits = self.forward(Segment(kind, slot, start, size, sample=True), *beside())
            start += size
            seen[start - 1] = logits[slot]
        return seen

    def open(self, work: Pass, adapter: Adapter, **how: Any) -> PassState:
        lengths = tuple(len(seq.tokens) for seq in work.seqs)
        pages = self.executor.ledger.reserve(f"pass:{work.id}", pages_of_pass(lengths, self.executor.numerics))
        return self.executor.open_pass(work, adapter.weights, adapter.layout, pages, **how)

    def window(self, state: PassState, tiles: int) -> Segment:
        """The next `tiles` tiles of a pass in forward, fewer at its end."""
        last = min(state.fwd_tile + tiles, len(state.spans)) - 1
        start = state.spans[state.fwd_tile].start
        return Segment(Kind.FINETUNE, state.work.id, start, state.spans[last].stop - start)

    def unit(self, state: PassState, tiles: int) -> Unit:
        """The next unit of a pass in backward, of at most `tiles` tiles."""
        return Unit(state.work.id, state.layer, max(0, state.end_tile - tiles), state.end_tile)

    def run_pass(
        self,
        work: Pass,
        adapter: Adapter,
        window: Callable[[], int] = lambda: 1,
        unit: Callable[[], int] = lambda: 1,
        between: Callable[[], object] = lambda: None,
    ) -> PassState:
        """A pass from open to close, its windows and units of drawn numbers of tiles; `between` runs after each."""
        state = self.open(work, adapter)
        while not state.forward_done:
            self.forward(self.window(state, window()))
            between()
        while not state.done:
            self.executor.backward(self.unit(state, unit()))
            between()
        if state.training:
            state.grads = state.grads.clone()  # its buffers are the next pass's
        self.executor.close_pass(work.id)
        return state


@pytest.fixture(scope="session")
def rig(plain: str) -> Callable[..., Rig]:
    """A rig on a fresh executor; the model is `plain` unless named."""

    def make(path: str | None = None, **settings: Any) -> Rig:
        config = {"max_model_length": 512, "kv_cache_bytes": 4 << 20, "threads": 1, **settings}
        return Rig(Executor(EngineConfig(path or plain, **config)))

    return make


# ---- an engine, driven to its end ----


class FakeClock:
    """Moves by itself a little at each look, evenly or at random, and otherwise when it is told."""

    def __init__(self, jitter_s: float = 0.0, seed: int = 0) -> None:
        self.now, self._jitter_s, self._random = 1.0, jitter_s, random.Random(seed)

    def __call__(self) -> float:
        self.now += self._jitter_s * self._random.uniform(0.5, 1.0)
        return self.now


class Driver:
    """An engine, what came out of it, and a limit so that a test never hangs."""

    def __init__(self, engine: Engine, clock: FakeClock) -> None:
        self.engine, self.clock = engine, clock
        self.events: list[Event] = []

    def submit(self, *commands: Command) -> None:
        """A job's state is read before this returns: what follows does not depend on the pace of a thread."""
        for command in commands:
            self.engine.submit(command)
            if isinstance(command, StartJob):
                self.engine._files._thread.submit(int).result()

    def step(self, interrupted: Callable[[], bool] = lambda: False) -> list[Event]:
        events = self.engine.step(interrupted)
        self.events += events
        return events

    def run(self, interrupted: Callable[[], bool] = lambda: False, limit: int = 200_000) -> Driver:
        """Until nothing is left to do."""
        for _ in range(limit):
            if self.engine.idle:
                return self
            if not self.step(interrupted) and not self.engine._files.idle:
                self.engine._files._thread.submit(int).result()  # a loop that spins would starve the thread
        raise AssertionError(f"the engine did not come to rest; last events {self.events[-5:]}")

    def of(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]

    def one(self, kind: type[E]) -> E:
        (event,) = self.of(kind)
        return event

    @property
    def failures(self) -> list[Event]:
        return [event for event in self.events if isinstance(event, RequestFailed | JobFailed)]

    def tokens(self) -> dict[str, list[int]]:
        """Tokens by request."""
        found: dict[str, list[int]] = {}
        for batch in self.of(TokenBatch):
            for token in batch.tokens:
                found.setdefault(token.request_id, []).append(token.token)
        return found

    def parameters(self, job: str = "job") -> torch.Tensor:
        """The job's adapter as one vector, copied."""
        layers = self.engine.jobs[job].weights.layers
        return torch.cat([x.flatten() for layer in layers for pair in layer.values() for x in pair])


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
    choose = serving.choose

    def spy(logits: torch.Tensor, choices: Sequence[Choice]) -> list[int]:
        rows.extend(logits.clone())
        return choose(logits, choices)

    monkeypatch.setattr(serving, "choose", spy)
    return rows


# ---- data ----


@pytest.fixture(scope="session")
def draw_tokens() -> Callable[[int, int], tuple[int, ...]]:
    """`count` tokens of the small vocabulary, never its end-of-text."""

    def draw(seed: int, count: int) -> tuple[int, ...]:
        source = random.Random(seed)
        return tuple(source.randrange(3, VOCAB) for _ in range(count))

    return draw


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
