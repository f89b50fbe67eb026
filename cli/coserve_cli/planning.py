"""What a model will take of a device, before it is there: the engine's own plan, and what training keeps beside what
other trainers would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coserve_engine.config import DeviceChoice, EngineConfig, ModelConfig
from coserve_engine.errors import EngineConfigError
from coserve_engine.hardware import Hardware
from coserve_engine.job_messages import LoraSpec
from coserve_engine.memory import MemoryPlan, kept_of_pass, plan_memory, sequence_bytes
from coserve_engine.startup import settle
from coserve_engine.tensors.dtypes import Dtypes
from coserve_engine.tensors.kept import levels, row_values
from coserve_engine.tensors.lora import LoraLayout

SHORTEST = 512
OPTIMIZER_COPIES = 4
"""Weights, gradient and AdamW's two moments of an adapter, all in the dtype of sums."""


@dataclass(frozen=True)
class Kept:
    """Bytes of one token in one layer that wait for its backward."""

    everything: int
    least: int
    """What this engine can drop to, and compute the rest again."""
    autograd: int
    """transformers and PEFT under torch.autograd, with flash or memory-efficient attention."""
    checkpointing: int
    """The same with gradient checkpointing at each layer, but for the one layer that is computed again."""


def kept_bytes(model: ModelConfig, adapter: LoraSpec, dtype: str) -> Kept:
    """Of training `adapter`."""
    dtypes = Dtypes.of(dtype)
    compute, wide = dtypes.compute.itemsize, dtypes.accumulate.itemsize
    everything, _, least = (row_values(level) for level in levels(model))
    lse = model.heads * (wide - compute)
    return Kept(
        everything * compute + lse,
        least * compute + lse,
        autograd_bytes(model, adapter, compute, wide),
        model.hidden * compute,
    )


def autograd_bytes(model: ModelConfig, adapter: LoraSpec, compute: int, wide: int) -> int:
    """What torch.autograd saves of a token in a layer of transformers' Llama with PEFT's LoRA, dropout 0.

    The norms save their input and its scale in the dtype of sums; frozen linears nothing; each adapter its input, where
    nobody else saved that, and its low-rank product; attention its queries, keys, values, result and log-sum-exp; the
    MLP's gate, its SiLU and up.
    """
    q, kv = model.heads * model.head_size, model.kv_heads * model.head_size
    targets = set(adapter.targets)
    values = 2 * q + 2 * kv + 3 * model.intermediate + adapter.rank * len(targets)
    values += model.hidden if targets & {"q_proj", "k_proj", "v_proj"} else 0
    values += model.hidden if targets & {"gate_proj", "up_proj"} else 0
    values += model.intermediate if "down_proj" in targets else 0
    return values * compute + (2 * model.hidden + 2 + model.heads) * wide


@dataclass(frozen=True)
class Fit:
    """Of one length: the plan or why it does not fit, sequences that the cache holds at once, and what one sample of
    this length keeps.
    """

    length: int
    plan: MemoryPlan | None
    refused: str
    sequences: int
    kept_bytes: int
    recomputed_layers: int
    autograd_bytes: int
    checkpointing_bytes: int


def lengths_of(model: ModelConfig) -> list[int]:
    """Powers of two from SHORTEST to what the model can."""
    lengths = [min(SHORTEST, model.max_positions)]
    while lengths[-1] * 2 <= model.max_positions:
        lengths.append(lengths[-1] * 2)
    if lengths[-1] != model.max_positions:
        lengths.append(model.max_positions)
    return lengths


def settled(
    model_path: Path, hardware: Hardware, dtype: str, rank: int, budget_bytes: int | None, jobs: int, length: int
) -> EngineConfig:
    """The engine's settings on that device.

    Raises:
        EngineConfigError: the device has no such dtype.
    """
    config = EngineConfig(
        model_path=str(model_path), max_model_length=length, finetuning=jobs > 0, max_rank=rank, pass_bytes=budget_bytes
    )
    return settle(config, DeviceChoice(device=hardware.kind, dtype=dtype, max_jobs=jobs), hardware)[0]


def fits(
    model: ModelConfig,
    configs: Sequence[EngineConfig],
    hardware: Hardware,
    adapter: LoraSpec,
    kv_bytes: int | None,
    jobs: int,
) -> list[Fit]:
    """Which of these settings, one for each length, fit."""
    return [_fit(model, config, hardware, adapter, kv_bytes, jobs) for config in configs]


def _fit(
    model: ModelConfig, config: EngineConfig, hardware: Hardware, adapter: LoraSpec, kv_bytes: int | None, jobs: int
) -> Fit:
    plan, refused = None, ""
    try:
        plan = plan_memory(model, config, hardware, kv_bytes, jobs)
    except EngineConfigError as error:
        refused = str(error)
    rows, per_token = config.numerics.pad(config.max_model_length), kept_bytes(model, adapter, config.dtype)
    kept, recomputed = kept_of_pass(model, config, rows)
    return Fit(
        config.max_model_length,
        plan,
        refused,
        0 if plan is None else plan.kv_bytes // sequence_bytes(model, config),
        kept,
        recomputed,
        rows * model.layers * per_token.autograd,
        rows * (model.layers * per_token.checkpointing + per_token.autograd),
    )


def adapter_bytes(model: ModelConfig, adapter: LoraSpec, dtype: str) -> int:
    """Of an adapter that trains, with its gradient and AdamW's moments."""
    return LoraLayout(model, adapter).size * OPTIMIZER_COPIES * Dtypes.of(dtype).accumulate.itemsize
