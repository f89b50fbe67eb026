"""The shape of a model, as plain data, and how an engine is set up."""

from __future__ import annotations

from dataclasses import dataclass, field

from coserve_engine.errors import EngineConfigError
from coserve_engine.numerics import Numerics

FAST, EXACT = "fast", "exact"
"""Modes of numerics: see `EngineConfig.numerics_mode`."""
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's: waves longer than original_positions / low_factor are stretched by `factor`, those shorter than
    original_positions / high_factor are not.
    """

    factor: float
    low_factor: float
    high_factor: float
    original_positions: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN's (Peng et al., 2023): dimensions that turn less than `beta_slow` times within original_positions are
    stretched by `factor`, those that turn more than `beta_fast` times are not; cos and sin are multiplied by
    `attention_factor`. `truncate`: the bounds between them are whole dimensions.
    """

    factor: float
    original_positions: int
    attention_factor: float
    beta_fast: float
    beta_slow: float
    truncate: bool


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding: base of the wave lengths, and how they are stretched beyond the context of pretraining."""

    theta: float
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of a decoder of Llama's kind. Lengths are counts of elements.

    Args:
        head_size: of one attention head; heads * head_size need not be the hidden size.
        biased: names of LINEARS that have a bias.
        qk_norm: whether queries and keys go through an RMSNorm, head by head, before they are rotated.
        windows: per layer, how many keys a row sees, its own included; None: all before it.
        tied: whether the head is the embedding.
    """

    vocab_size: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    rms_eps: float
    rope: Rope
    max_positions: int
    biased: tuple[str, ...]
    qk_norm: bool
    windows: tuple[int | None, ...]
    tied: bool
    eos_token_ids: tuple[int, ...]

    def linear_shape(self, name: str) -> tuple[int, int]:
        """(out features, in features) of one of LINEARS."""
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        return {
            "q_proj": (q, self.hidden),
            "k_proj": (kv, self.hidden),
            "v_proj": (kv, self.hidden),
            "o_proj": (self.hidden, q),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }[name]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How to run one engine.

    Args:
        model_path: a Hugging Face folder (config.json, safetensors).
        max_model_length: tokens of prompt and output together.
        max_batch_tokens: rows of one forward. A finetuning window needs a tile of them beside the decode rows.
        max_requests: requests that run at once, fewer where `max_batch_tokens` is small; others wait.
        max_waiting: requests that wait; more are refused.
        max_window_rows: rows of one forward with finetuning windows in it; None: as the latency model's regime fills
            the device, and `max_batch_tokens` where nobody is served.
        pass_tokens: of the samples that share a pass of a job; a longer sample is a pass of its own. It is part of what
            a job computes, so it follows from the settings and the kind of device, never from what was measured.
        kv_cache_bytes: size of the page pool.
        ttft_s, tpot_s: the promise: time to first token, and between tokens, in seconds.
        threads: torch threads.
        finetuning: whether jobs are accepted.
        pass_bytes: what one pass may keep for its backward; the rest is computed again. None: everything is kept.
        max_slowdown_percent: with finetuning an iteration may take so much longer than it is predicted to take
            without; None: only the promise limits it.
        end_tokens: what ends an answer; None: config.json's eos_token_id.
        kernel_fallback: whether plain operators may compute where a GPU's kernels cannot.
        dtype: "float32", "bfloat16" (adapters that train and all sums stay float32), or "float64" (tests).
        numerics_mode: FAST, or EXACT: a row's bits depend on its sequence alone, whatever its batch, chunks, cache hits
            and preemptions, and a job's gradients on its samples alone; an engine that cannot keep that does not start.
            FAST promises none of it on a GPU, and is as exact on a CPU in float32.
    """

    model_path: str
    max_model_length: int = 1024
    max_batch_tokens: int = 512
    max_requests: int = 64
    max_waiting: int = 1024
    max_window_rows: int | None = None
    pass_tokens: int = 512
    kv_cache_bytes: int = 256 << 20
    ttft_s: float = 1.0
    tpot_s: float = 0.2
    threads: int = 1
    finetuning: bool = True
    max_slowdown_percent: float | None = None
    max_rank: int = 64
    pass_bytes: int | None = None
    end_tokens: tuple[int, ...] | None = None
    kernel_fallback: bool = False
    dtype: str = "float32"
    device: str = "cpu"
    numerics_mode: str = FAST
    numerics: Numerics = field(default_factory=Numerics)

    @property
    def exact(self) -> bool:
        """Whether `numerics_mode` is EXACT.

        Raises:
            EngineConfigError: it is none.
        """
        if self.numerics_mode not in (FAST, EXACT):
            raise EngineConfigError(f"numerics_mode is {self.numerics_mode!r}; it must be one of {FAST}, {EXACT}")
        return self.numerics_mode == EXACT

    @property
    def places(self) -> int:
        """Requests that run at once: their decode rows leave a tile of a forward, or half of a short one, to prompts
        and windows, which would never run otherwise.
        """
        rest = min(self.numerics.tile, self.max_batch_tokens // 2)
        return max(1, min(self.max_requests, self.max_batch_tokens - rest))


@dataclass(frozen=True, slots=True)
class DeviceChoice:
    """What of an EngineConfig is settled where the device is known: "auto" or None leaves it to the device.

    Args:
        device: "auto", "cpu" or "cuda". Auto takes a GPU where `gpu_resource` names one or torch sees one.
        gpu_resource: what the pod's resources ask for, such as nvidia.com/gpu; empty: no GPU.
        dtype: "auto", "float32" or "bfloat16".
        max_requests, max_batch_tokens, kv_cache_bytes: as in EngineConfig.
        max_jobs: finetuning jobs at once, for which memory is planned.
        visible_devices: CUDA_VISIBLE_DEVICES, for what is said where it hides a GPU; None: not set.
        kernel_cache: a folder where kernels that were compiled for a GPU are kept; None: they end with the process.
        image_kernels: a folder of compiled kernels that the image brings, if it does.
    """

    device: str = "auto"
    gpu_resource: str = ""
    dtype: str = "auto"
    max_requests: int | None = None
    max_batch_tokens: int | None = None
    kv_cache_bytes: int | None = None
    max_jobs: int = 1
    visible_devices: str | None = None
    kernel_cache: str | None = None
    image_kernels: str | None = None
