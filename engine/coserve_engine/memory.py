"""What an engine will take of its device's memory, part by part, before anything of it is loaded.

Weights, cache, passes and the state of jobs are the sizes of the tensors that the engine makes; what operators need in
between is an estimate from above. Whatever is left goes to the KV cache, where nothing else is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

from coserve_engine.config import LINEARS, EngineConfig, ModelConfig
from coserve_engine.errors import EngineConfigError
from coserve_engine.hardware import CUDA, Hardware
from coserve_engine.job_messages import LoraSpec
from coserve_engine.tensors.dtypes import Dtypes
from coserve_engine.tensors.kept import plan_kept, row_values
from coserve_engine.tensors.kv_cache import KVCache
from coserve_engine.tensors.lora import LoraLayout
from coserve_engine.training.jobs import MAX_LIVE

WORKSPACE_BYTES = 2 * (32 << 20)
"""Of cuBLAS on a GPU: 32 MiB a stream on Hopper, one stream that computes and one that loads adapters."""
KEPT_FREE = 20
"""One part in so many of a GPU's memory stays free: for adapters that are served, and for what torch's allocator
cannot use.
"""
MOST_PAGES = 1 << 18
"""Of a pool that takes what is left: a tiny model would have millions, which the books of pages cannot keep."""


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes, and the settings that lower them."""

    name: str
    bytes: int
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Of a device's free memory, the `parts` beside the KV cache, and the cache itself."""

    hardware: Hardware
    parts: tuple[Part, ...]
    kv_bytes: int
    pages: int

    def lines(self) -> tuple[str, ...]:
        """For the log."""
        left = self.hardware.free_bytes - sum(part.bytes for part in self.parts) - self.kv_bytes
        shown = (*self.parts, Part(f"KV cache ({self.pages} pages)", self.kv_bytes), Part("left", left))
        return (f"{self.hardware}", *(f"{part.name}: {part.bytes:,} bytes" for part in shown))


def plan_memory(
    model: ModelConfig, config: EngineConfig, hardware: Hardware, kv_bytes: int | None, jobs: int = 1
) -> MemoryPlan:
    """The plan of an engine for a device.

    On a GPU every part is taken before a request or a job comes, or must be there for it. A CPU's memory is taken page
    by page as it is written, so that only weights and one sequence are sure to be needed: nothing else is refused.

    Args:
        config: with the device's dtype, requests and batch tokens.
        kv_bytes: what the cache is to take; None: what is left.
        jobs: that run at once.

    Raises:
        EngineConfigError: it does not fit; every part is named, in bytes.
    """
    page, sequence = page_bytes(model, config), sequence_bytes(model, config)
    if kv_bytes is not None and kv_bytes < sequence:
        raise EngineConfigError(
            f"engine.kvCacheMemory is {kv_bytes:,} bytes, and one sequence of maxModelLength {config.max_model_length} "
            f"takes {sequence:,}; raise kvCacheMemory or lower maxModelLength"
        )
    gpu, free_bytes = hardware.kind == CUDA, hardware.free_bytes
    parts = _parts(model, config, jobs)
    if gpu:
        parts += (Part("workspaces", WORKSPACE_BYTES), Part("kept free", free_bytes // KEPT_FREE))
    taken = sum(part.bytes for part in parts)
    if kv_bytes is None:
        kv_bytes = max(sequence, min(free_bytes - taken, MOST_PAGES * page) // page * page)
    cache = Part("KV cache", kv_bytes, "engine.kvCacheMemory")
    if kv_bytes == sequence:
        cache = Part("KV cache of one sequence", sequence, "model.maxModelLength")
    needed = (*parts, cache) if gpu else (parts[0], Part("one sequence", sequence, "model.maxModelLength"))
    if sum(part.bytes for part in needed) > free_bytes:
        raise EngineConfigError(_lacking(needed, hardware))
    return MemoryPlan(hardware, parts, kv_bytes, kv_bytes // page)


def _lacking(needed: tuple[Part, ...], hardware: Hardware) -> str:
    lacking = sum(part.bytes for part in needed) - hardware.free_bytes
    shown = " + ".join(f"{part.name} {part.bytes:,}" for part in needed)
    largest = sorted(needed, key=lambda part: -part.bytes)
    remedies = list(dict.fromkeys(part.remedy for part in largest if part.remedy and part.bytes))
    return (
        f"{hardware} has {lacking:,} bytes too few for: {shown}; use a device with more memory or a smaller model, or "
        f"lower {', '.join(remedies)}"
    )


def _parts(model: ModelConfig, config: EngineConfig, jobs: int) -> tuple[Part, ...]:
    """All but the cache; weights come first."""
    compute, wide = _item_bytes(config)
    positions = config.numerics.pad(config.max_model_length)
    parts = (
        Part("weights", weight_values(model) * compute),
        Part("positions", 2 * positions * model.head_size * wide, "model.maxModelLength"),
        Part("an iteration", iteration_bytes(model, config), "engine.maxBatchTokens, engine.maxRequests"),
    )
    if not config.finetuning:
        return parts
    # weights, the best, gradient, two moments; copies of weights and moments for a checkpoint; weights to multiply by
    state = lora_values(model, config.max_rank) * (8 * wide + compute)
    one = pass_bytes(model, config, max(config.pass_tokens, positions))
    return (
        *parts,
        Part(f"state of {jobs} jobs", jobs * state, "finetuning.maxRank, finetuning.maxConcurrentJobs"),
        Part(f"{jobs * MAX_LIVE} passes", jobs * MAX_LIVE * one, "finetuning.activationMemory"),
    )


def _item_bytes(config: EngineConfig) -> tuple[int, int]:
    """Of a value that is multiplied, and of one that is summed up."""
    dtypes = Dtypes.of(config.dtype)
    return dtypes.compute.itemsize, dtypes.accumulate.itemsize


def weight_values(model: ModelConfig) -> int:
    """Values of all weights and biases; a tied head is the embedding."""
    linears = sum(out * into for out, into in map(model.linear_shape, LINEARS))
    biases = sum(model.linear_shape(name)[0] for name in model.biased)
    layer = linears + biases + 2 * model.hidden + (2 * model.head_size if model.qk_norm else 0)
    return model.layers * layer + model.hidden + (1 if model.tied else 2) * model.vocab_size * model.hidden


def page_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """Of one page of the cache."""
    return KVCache.page_bytes(model, config.numerics, Dtypes.of(config.dtype).cache)


def sequence_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """The smallest cache: one sequence of `max_model_length`, and the page that is nobody's."""
    numerics = config.numerics
    return (numerics.pages(numerics.pad(config.max_model_length)) + 1) * page_bytes(model, config)


def lora_values(model: ModelConfig, rank: int) -> int:
    """Values of an adapter of all linears."""
    return LoraLayout(model, LoraSpec(rank, 1.0, LINEARS)).size


def pass_bytes(model: ModelConfig, config: EngineConfig, rows: int) -> int:
    """What a training pass of so many rows leases, with the gradient of the largest adapter."""
    compute, wide = _item_bytes(config)
    lse = model.layers * model.heads * (wide - compute)
    limit = None if config.pass_bytes is None else config.pass_bytes - rows * lse
    kept = sum(map(row_values, plan_kept(model, rows * compute, limit)))
    ends = 2 * model.hidden * compute + 2 * model.kv_heads * model.head_size * wide
    return rows * (kept * compute + lse + ends) + lora_values(model, config.max_rank) * wide


def iteration_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """From above, what is alive at once within a layer of a full batch, or between the last and the choice of tokens:
    logits, their log-probabilities, and both once more sorted.
    """
    compute, wide = _item_bytes(config)
    queries = model.heads * model.head_size
    row = 6 * model.hidden + 2 * queries + 4 * model.kv_heads * model.head_size + 3 * model.intermediate
    logits = max(config.places, config.numerics.tile) * model.vocab_size * 4 * wide
    return config.max_batch_tokens * row * compute + logits
