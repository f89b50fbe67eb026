"""What an engine was planned to take of its device beside what it takes, part by part."""

from __future__ import annotations

import gc
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from runner import Figures

from coserve_engine.config import EngineConfig
from coserve_engine.engine import Engine
from coserve_engine.errors import EngineConfigError
from coserve_engine.formats.model_folder import read_model_config
from coserve_engine.hardware import find_gpu, this_cpu
from coserve_engine.memory import MemoryPlan, plan_memory
from coserve_engine.tensors.lora import LoraWeights


@dataclass(frozen=True, slots=True)
class Peak:
    """Bytes of a GPU: what torch gave out at most and between two iterations, what it took, what the process took
    beside it (the driver's context, and kernels).
    """

    most: int
    between: int
    reserved: int
    outside: int

    @classmethod
    def of(cls, device: torch.device) -> Peak:
        """Since `reset_peak`."""
        free, total = torch.cuda.mem_get_info(device)
        now, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        return cls(torch.cuda.max_memory_allocated(device), now, reserved, total - free - reserved)


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def planned(config: EngineConfig, device: torch.device) -> MemoryPlan | str:
    """Before an engine of `config` is there: its plan, or why it has none."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what an engine before it had is free
    hardware = find_gpu() if device.type == "cuda" else this_cpu()
    if isinstance(hardware, str):
        return hardware
    try:
        return plan_memory(read_model_config(Path(config.model_path)), config, hardware, config.kv_cache_bytes)
    except EngineConfigError as error:
        return str(error)


def held(engine: Engine) -> dict[str, int]:
    """Bytes of what outlives an iteration, by the plan's names."""
    e = engine.executor
    weights = e.transformer.weights
    frozen = [weights.embed, weights.norm, weights.head.weight]
    for layer in weights.layers:
        linears = (*layer.linears.values(), *layer.fused.values())
        norms = (layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm)
        frozen += [*norms, *(tensor for linear in linears for tensor in (linear.weight, linear.bias))]
    state: list[torch.Tensor | None] = []
    for job in engine.jobs.values():
        has = job._state
        state += [has.param, has.adam.m, has.adam.v, job._grad, has.best and has.best.param, *_tensors(job.weights)]
    served = [tensor for adapter in engine._adapters.values() for tensor in _tensors(adapter)]
    return {
        "weights": _bytes(frozen),
        "positions": e.kernels.rope.nbytes,
        "counts for penalties": e.counts.counts.nbytes + e.counts.seen.nbytes,
        "state of jobs": _bytes(state),
        "passes": e.buffers.bytes,
        "KV cache": e.cache.k.nbytes + e.cache.v.nbytes,
        "served adapters": _bytes(served),
    }


def _tensors(adapter: LoraWeights) -> list[torch.Tensor]:
    pairs = [pair for layer in adapter.layers for pair in layer.values()]
    return [*(adapter.copied or ()), *(tensor for pair in pairs for tensor in pair[:4])]


def _bytes(tensors: list[torch.Tensor | None]) -> int:
    """Of the storages behind them, each once."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def memory(engine: Engine, device: torch.device, plan: MemoryPlan | str) -> Figures:
    """What the engine holds, and took since `reset_peak`, beside its plan. An engine without a plan is not met: nobody
    could have started it.
    """
    peak = Peak.of(device) if device.type == "cuda" else None
    if isinstance(plan, str):
        found = compare({}, held(engine), peak)
        return {**found, "lines": [f"- no plan: {plan}", *found["lines"]], "met": False}
    parts = {re.sub(r"\b\d+ ", "", part.name): part.bytes for part in plan.parts}
    found = compare({**parts, "KV cache": plan.kv_bytes}, held(engine), peak)
    return {**found, "lines": [f"- planned for {plan.hardware}", *found["lines"]]}


def compare(plan: Mapping[str, int], found: Mapping[str, int], peak: Peak | None) -> Figures:
    """A table of what is planned and what is taken; met where no part takes more than its plan, nor torch than all.

    Args:
        plan: the parts without numbers in their names, and the cache.
        peak: None on a CPU, where torch counts nothing.
    """
    whole, taken = dict(plan), dict(found)
    if peak is not None:
        taken["an iteration"] = peak.most - peak.between
        taken["held, by nothing named here"] = peak.between - sum(found.values())
        whole["all that torch reserved"] = sum(plan.values())
        taken["all that torch reserved"] = peak.reserved
    over = {name for name, size in taken.items() if size > whole.get(name, size)}
    lines = ["", "| bytes of | planned | taken |", "|---|---|---|"]
    for name in dict.fromkeys((*whole, *taken)):
        planned_bytes, taken_bytes = (f"{of[name]:,}" if name in of else "" for of in (whole, taken))
        lines.append(f"| {name} | {planned_bytes} | {taken_bytes}{', MORE THAN PLANNED' if name in over else ''} |")
    if peak is not None:
        lines += ["", f"- torch's peak was {peak.most:,} bytes; the driver and kernels took {peak.outside:,} beside it"]
    return {"bytes": {"planned": whole, "taken": taken}, "lines": lines, "met": not over}
