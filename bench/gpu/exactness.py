"""Whether plain operators and kernels on the device compute what float64 on a CPU does, which tests hold to
transformers and PEFT.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from engine_rig import Rig
from measure import optimizer_step
from parity import BOUND, LENGTH, error, logits, rounded_adapter, samples, trained
from random_models import Adapter, Computed, draw_sequence
from runner import Figures
from tables import plain_operators

from coserve_engine.config import LINEARS, EngineConfig
from coserve_engine.engine import Engine
from coserve_engine.kernels.select import select
from coserve_engine.messages import LoraSpec, PassDone, StartJob
from coserve_engine.model import executor as executor_module
from coserve_engine.model.executor import Executor

FLOAT32_BOUND = 1e-5
"""Products in TF32 would err by 5e-4."""
LOSS_BOUND = {"bfloat16": 1e-2, "float32": 1e-5}
STEPS = 4
CPU = torch.device("cpu")


def _settings(device: torch.device, dtype: str) -> dict[str, Any]:
    memory = {"max_model_length": 512, "kv_cache_bytes": 64 << 20}
    return {**memory, "dtype": dtype, "device": str(device)}


def _computed(folder: Path, device: torch.device, dtype: str, adapter: Adapter | None = None) -> dict[str, Any]:
    """Logits, gradient and loss, by `adapter` or one that is drawn."""
    rig = Rig(Executor(EngineConfig(str(folder), **_settings(device, dtype))))
    drawn = adapter or rounded_adapter(rig.executor)
    kind = Computed if dtype == "bfloat16" else Adapter
    used = kind(drawn.layout, drawn.flat.to(device, rig.executor.dtypes.lora))
    rows = logits(rig, used, draw_sequence(1, LENGTH))
    rig.clear()
    state = trained(rig, used, samples())
    return {"adapter": drawn, "logits": rows, "gradient": state.grads, "loss": state.loss_sum()}


def parity(folder: Path, device: torch.device) -> Figures:
    """Errors of logits, gradient and loss in bfloat16 and float32, of plain operators and of kernels; bfloat16's beside
    those of plain operators on a CPU, which tests hold to PEFT's.
    """
    exact = _computed(folder, CPU, "float64")
    figures: Figures = {"lines": [], "met": True}
    for dtype in ("bfloat16", "float32"):
        with mock.patch.object(executor_module, "select", plain_operators):
            same = _computed(folder, CPU, dtype, exact["adapter"]) if dtype == "bfloat16" else None
        for table, chosen in _tables(device):
            with mock.patch.object(executor_module, "select", chosen):
                found = _computed(folder, device, dtype, exact["adapter"])
            for what in ("logits", "gradient"):
                value = error(found[what], exact[what])
                bound = FLOAT32_BOUND if same is None else BOUND * error(same[what], exact[what])
                _hold(figures, f"{table}{dtype} {what}", value, bound)
            _hold(figures, f"{table}{dtype} loss", abs(found["loss"] / exact["loss"] - 1), LOSS_BOUND[dtype])
    return figures


def _tables(device: torch.device) -> list[tuple[str, Any]]:
    """Tables of kernels that compute on a device, by a prefix of what is found: plain operators, and on a GPU ours."""
    ours = [("kernels, ", select)] if device.type == "cuda" else []
    return [("", plain_operators), *ours]


def _hold(figures: Figures, what: str, value: float, bound: float) -> None:
    met = value <= bound  # NaN is not
    figures[what] = {"error": value, "bound": bound}
    figures["met"] = figures["met"] and met
    figures["lines"].append(f"- {what}: error {value:.1e}, held to {bound:.1e}{'' if met else ': NOT MET'}")


def job_losses(folder: Path, device: torch.device, dtype: str) -> list[float]:
    """Of each pass of a job of STEPS optimizer steps, by the whole engine."""
    engine = Engine(EngineConfig(str(folder), **_settings(device, dtype)))
    engine.submit(StartJob("job", LoraSpec(4, 8.0, LINEARS), 0))
    for step in range(STEPS):
        for command in optimizer_step("job", step, [[draw_sequence(9, 90)], [draw_sequence(8, 40)]]):
            engine.submit(command)
    losses: list[float] = []
    while not engine.idle:
        events = engine.step()
        losses += [event.loss_sum for event in events if isinstance(event, PassDone)]
        if not events:
            time.sleep(0.001)  # the thread that makes the adapter wants the interpreter
    return losses


def jobs(folder: Path, device: torch.device) -> Figures:
    """Losses of a job over a few optimizer steps."""
    exact = job_losses(folder, CPU, "float64")
    figures: Figures = {"lines": [], "met": True, "exact": exact}
    for dtype, (table, chosen) in itertools.product(("bfloat16", "float32"), _tables(device)):
        with mock.patch.object(executor_module, "select", chosen):
            found = job_losses(folder, device, dtype)
        worst = max(abs(a / b - 1) for a, b in zip(found, exact, strict=True))
        _hold(figures, f"{table}{dtype} losses of {STEPS} steps", worst, LOSS_BOUND[dtype])
    return figures
