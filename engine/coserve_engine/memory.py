"""What an engine will take of its device's memory, part by part, before anything of it is loaded.

Weights, cache, passes and the state of jobs are the sizes of the tensors that the engine makes; what operators need in
between is an estimate from above. Whatever is left goes to the KV cache, where nothing else is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from coserve_engine.config import LINEARS, EngineConfig, ModelConfig
from coserve_engine.errors import EngineConfigError
from coserve_engine.hardware import CUDA, Hardware
from coserve_engine.job_messages import LoraSpec
from coserve_engine.kernels.cpu.linears import PackedLinear
from coserve_engine.kernels.graphs import SEQUENCES
from coserve_engine.kernels.torch.attention import GATHERED_BYTES
from coserve_engine.model.graphs import buckets
from coserve_engine.model.mixed import mixed_sizes
from coserve_engine.numerics import HEAD_ROWS
from coserve_engine.tensors.dtypes import Dtypes
from coserve_engine.tensors.kept import levels, plan_kept, row_values
from coserve_engine.tensors.kv_cache import KVCache
from coserve_engine.tensors.lora import LoraLayout, padded
from coserve_engine.training.jobs import MAX_LIVE

WORKSPACE_BYTES = 2 * (32 << 20)
"""Of cuBLAS on a GPU: 32 MiB a stream on Hopper, one stream that computes and one that loads adapters."""
SPLITS, LORA_SPLITS, GRAPH_BYTES = 32, 8, 2 << 20
"""Parts of a decode row's attention at most, of a sum of its adapter's, and bytes of a graph of one forward."""
ADAPTER_BYTES = 32
"""Of a linear of an adapter in the tables of a batch."""
KEPT_FREE = 20
"""One part in so many of a GPU's memory stays free: for adapters that are served, and for what torch's allocator
cannot use.
"""
CPU_KV_BYTES = 256 << 20
"""Of the cache on a CPU, where nothing else is asked for."""
LOGIT_BYTES = 96
"""Of a logit while tokens are chosen, where each row has penalties, top_p and log-probabilities: copies, the sorted
ones with their ids, sums in float64 (60 as measured on a CPU), and what a GPU's sort needs beside them.
"""
TRAINED_LOGIT_BYTES = 32
"""Of a logit of a tile of a pass, or of a prompt that is scored (25 as measured)."""
HEAD_LOGIT_BYTES = 6
"""Of a logit and its derivative in bfloat16, of the rows that meet the head of a pass at once."""
ITERATION = "engine.maxBatchTokens, engine.maxRequests, model.maxModelLength"
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
        rest = Part("left", left) if left >= 0 else Part("lacking, should all of it be in use at once", -left)
        shown = (*self.parts, Part(f"KV cache ({self.pages} pages)", self.kv_bytes), rest)
        return (f"{self.hardware}", *(f"{part.name}: {part.bytes:,} bytes" for part in shown))


def plan_memory(
    model: ModelConfig, config: EngineConfig, hardware: Hardware, kv_bytes: int | None, jobs: int = 1
) -> MemoryPlan:
    """The plan of an engine for a device.

    On a GPU every part is taken before a request or a job comes, or must be there for it. A CPU's memory is taken page
    by page as it is written, so that only weights and the cache, whose pages are all written in time, are sure to be
    needed: nothing else is refused.

    Args:
        config: with the device's dtype, requests and batch tokens.
        kv_bytes: what the cache is to take; None: what is left on a GPU, CPU_KV_BYTES on a CPU.
        jobs: that run at once.

    Raises:
        EngineConfigError: it does not fit; every part is named, in bytes.
    """
    page, sequence = page_bytes(model, config), sequence_bytes(model, config)
    gpu, free_bytes = hardware.kind == CUDA, hardware.free_bytes
    said = "is"
    if kv_bytes is None and not gpu:
        said, kv_bytes = "is not set, which on a CPU is", CPU_KV_BYTES
    if kv_bytes is not None and kv_bytes < sequence:
        raise EngineConfigError(
            f"engine.kvCacheMemory {said} {kv_bytes:,} bytes, and one sequence of maxModelLength "
            f"{config.max_model_length} takes {sequence:,}; raise kvCacheMemory or lower maxModelLength"
            f"{_shorter(kv_bytes // page - 1, config)}"
        )
    parts = _parts(model, config, jobs, gpu=gpu)
    if gpu:
        graphs = Part("graphs", graphs_bytes(model, config), "engine.maxRequests, engine.maxBatchTokens")
        parts += (graphs, Part("workspaces", WORKSPACE_BYTES), Part("kept free", free_bytes // KEPT_FREE))
    taken = sum(part.bytes for part in parts)
    if kv_bytes is None:
        kv_bytes = max(sequence, min(free_bytes - taken, MOST_PAGES * page) // page * page)
    cache = Part("KV cache", kv_bytes, "engine.kvCacheMemory")
    if kv_bytes == sequence:
        cache = Part("KV cache of one sequence", sequence, "model.maxModelLength")
    needed = (*parts, cache) if gpu else (parts[0], cache)
    if sum(part.bytes for part in needed) > free_bytes:
        raise EngineConfigError(_lacking(needed, config, hardware))
    return MemoryPlan(hardware, parts, kv_bytes, kv_bytes // page)


def _shorter(pages: int, config: EngineConfig) -> str:
    """The length for which so many pages are enough, where there is one."""
    return f" to {pages * config.numerics.page}" if pages > 0 else ""


def _lacking(needed: tuple[Part, ...], config: EngineConfig, hardware: Hardware) -> str:
    lacking = sum(part.bytes for part in needed) - hardware.free_bytes
    shown = " + ".join(f"{part.name} {part.bytes:,}" for part in needed)
    largest = sorted(needed, key=lambda part: -part.bytes)
    fixed = sum(part.bytes for part in needed if not part.remedy)
    remedies = list(dict.fromkeys(part.remedy for part in largest if part.remedy and part.bytes))
    ways = ["use a device with more memory or a smaller model"]
    halved = sum(part.bytes for part in needed if part.remedy != "engine.kvCacheMemory") // 2
    if config.dtype == "float32" and hardware.bfloat16 and lacking <= halved:
        ways.append("set engine.dtype to bfloat16")
    if fixed < hardware.free_bytes:
        ways.append(f"lower {', '.join(remedies)}")
    return f"{hardware} has {lacking:,} bytes too few for: {shown}; {', or '.join(ways)}"


def _parts(model: ModelConfig, config: EngineConfig, jobs: int, *, gpu: bool) -> tuple[Part, ...]:
    """All but the cache; weights come first."""
    compute, wide = _item_bytes(config)
    by_onednn = not gpu and config.dtype == "float32" and PackedLinear.available()
    packed = 4 * packed_values(model, config) if by_onednn else 0
    positions = config.numerics.pad(config.max_model_length)
    parts = (
        Part("weights", weight_values(model) * compute),
        *((Part("weights as oneDNN lays them out", packed),) if packed else ()),
        Part("positions", 2 * positions * model.head_size * wide, "model.maxModelLength"),
        Part("an iteration", iteration_bytes(model, config), ITERATION),
        Part("counts for penalties", counts_bytes(model, config), "engine.maxRequests"),
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


def _linear_values(model: ModelConfig) -> int:
    """Of a layer's linears."""
    return sum(out * into for out, into in map(model.linear_shape, LINEARS))


def packed_values(model: ModelConfig, config: EngineConfig) -> int:
    """Values at most beside those of `weight_values`, where oneDNN has the products: linears and head are laid out
    once, for backward once more, and the embedding keeps a copy of its own.
    """
    products, head = model.layers * _linear_values(model), model.vocab_size * model.hidden
    again = products + head if config.finetuning else 0
    return again + (head if model.tied else 0)


def weight_values(model: ModelConfig) -> int:
    """Values of all weights and biases; a tied head is the embedding."""
    biases = sum(model.linear_shape(name)[0] for name in model.biased)
    norms = 2 * model.hidden + (2 * model.head_size if model.qk_norm else 0)
    layer = _linear_values(model) + biases + norms
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
    kept, _ = kept_of_pass(model, config, rows)
    ends = 2 * model.hidden * compute + 2 * model.kv_heads * model.head_size * wide
    return kept + rows * ends + lora_values(model, config.max_rank) * wide


def kept_of_pass(model: ModelConfig, config: EngineConfig, rows: int) -> tuple[int, int]:
    """Bytes that a pass of so many rows keeps for its backward, within `pass_bytes`, and how many of the layers keep
    less than everything.
    """
    compute, wide = _item_bytes(config)
    lse = model.layers * model.heads * (wide - compute)
    limit = None if config.pass_bytes is None else config.pass_bytes - rows * lse
    chosen = plan_kept(model, rows * compute, limit)
    everything = levels(model)[0]
    return rows * (sum(map(row_values, chosen)) * compute + lse), sum(layer != everything for layer in chosen)


def counts_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """Of a place for each request that runs, as `TokenCounts` makes them: twice as many again and again, half of them
    once more meanwhile.
    """
    places = 1 << (max(4, config.places) - 1).bit_length()
    seen = 2 * config.max_model_length * torch.int64.itemsize
    return 3 * places // 2 * (model.vocab_size * torch.int32.itemsize + seen)


def graphs_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """Of captured forwards: what one of the most rows has alive, since one is replayed at a time, and of each its rows,
    the page tables of decode rows and of other sequences, the tables of adapters and its nodes; by how rows have
    adapters there are three of a size.
    """
    compute, wide = _item_bytes(config)
    pages = config.numerics.pages(config.numerics.pad(config.max_model_length))
    sizes = [(rows, rows) for rows in buckets(config.places, config.numerics)]
    mixed = mixed_sizes(config.places, config.max_batch_tokens, config.numerics)
    sizes += [(size.rows, size.decode + SEQUENCES) for size in mixed]
    most = max(rows for rows, _ in sizes)
    layer = 3 * most * (compute + wide) * _row_width(model)
    parts = config.places * model.heads * SPLITS * (model.head_size + 1) * wide
    low = LORA_SPLITS * 3 * most * padded(config.max_rank) * wide
    table, adapter = pages * torch.int64.itemsize, ADAPTER_BYTES * model.layers * len(LINEARS)
    each = [rows * model.hidden * compute + tables * (table + adapter) + GRAPH_BYTES for rows, tables in sizes]
    return layer + parts + low + 3 * sum(each)


def iteration_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """From above, what is alive at once beside what outlives an iteration: rows of a layer with their attention, or
    logits and the choice of tokens; where a CPU's kernels compute they take less.
    """
    hidden = config.max_batch_tokens * model.hidden * Dtypes.of(config.dtype).compute.itemsize
    chunk = min(HEAD_ROWS, config.pass_tokens) * HEAD_LOGIT_BYTES if config.device.startswith(CUDA) else 0
    trained = max(config.numerics.tile * TRAINED_LOGIT_BYTES, chunk)
    logits = max(config.places * LOGIT_BYTES, trained) * model.vocab_size
    return max(hidden + logits, _rows_bytes(model, config) + _attention_bytes(model, config))


def _rows_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """Of rows within a layer: 3 values of each width in both dtypes forward, 4 in a unit of a whole pass backward."""
    compute, wide = _item_bytes(config)
    width = _row_width(model)
    unit = max(config.pass_tokens, config.numerics.pad(config.max_model_length)) if config.finetuning else 0
    return (compute + wide) * width * max(3 * config.max_batch_tokens, 4 * unit)


def _row_width(model: ModelConfig) -> int:
    """Values of a row within a layer."""
    return model.hidden + (model.heads + model.kv_heads) * model.head_size + model.intermediate


def _attention_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """Of decode rows with gathered keys, or of a tile of one sequence with all heads' scores; in the dtype of sums."""
    _, wide = _item_bytes(config)
    numerics = config.numerics
    keys = numerics.pages(numerics.pad(config.max_model_length)) * numerics.page
    gathered, scores = model.kv_heads * model.head_size * keys * wide, model.heads * keys * wide
    rows = min(config.places, max(1, GATHERED_BYTES // gathered))
    return max(rows * (2 * gathered + 3 * scores), 4 * gathered + 5 * numerics.tile * scores)
