"""A job's state between two optimizer steps: adapter (PEFT), moments, counters, and what the driver wants back.

Nothing of a pass is saved: passes since the last optimizer step are replayed, and replay is exact.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from coserve_engine.adapter_folder import read_adapter
from coserve_engine.artifacts import peft_files, write_folder
from coserve_engine.errors import AdapterFolderError, CheckpointError
from coserve_engine.folders import verify_folder
from coserve_engine.lora import LoraLayout
from coserve_engine.messages import LoraSpec
from coserve_engine.numerics import Numerics
from coserve_engine.optim import AdamState

STATE = "state.json"
MOMENTS = "optimizer.safetensors"


@dataclass(frozen=True, slots=True)
class TrainingState:
    """What a checkpoint holds: copies, so that training goes on while they are written."""

    param: torch.Tensor
    adam: AdamState
    step: int
    seq_no: int

    def copy(self) -> TrainingState:
        adam = AdamState(self.adam.m.clone(), self.adam.v.clone(), self.adam.updates)
        return replace(self, param=self.param.clone(), adam=adam)


def save_checkpoint(
    path: Path, layout: LoraLayout, state: TrainingState, numerics: Numerics, files: dict[str, str], base_model: str
) -> str:
    """Write folder `path`; returns the sha256 of its manifest."""
    texts, tensors = peft_files(layout, state.param, base_model)
    facts = {
        "version": 1,
        "step": state.step,
        "seq_no": state.seq_no,
        "updates": state.adam.updates,
        "lora": asdict(layout.spec),
        "numerics": asdict(numerics),
        "files": sorted(files),
    }
    texts |= {**files, STATE: json.dumps(facts, indent=1)}
    return write_folder(path, texts, tensors | {MOMENTS: {"m": state.adam.m.cpu(), "v": state.adam.v.cpu()}})


def load_checkpoint(
    path: Path, layout: LoraLayout, numerics: Numerics, dtype: torch.dtype, device: torch.device
) -> tuple[TrainingState, dict[str, str]]:
    """Read and check folder `path`.

    Raises:
        CheckpointError: it is corrupt, or belongs to a run with another LoRA shape or other tile sizes.
    """
    verify_folder(path)
    try:
        facts: dict[str, Any] = json.loads((path / STATE).read_text())
        lora = facts["lora"]
        found = LoraSpec(lora["rank"], lora["alpha"], tuple(lora["targets"]), use_rslora=lora.get("use_rslora", False))
        if found != layout.spec:
            raise CheckpointError(f"{path / STATE}: lora is {found}, the job says {layout.spec}")
        if facts["numerics"] != asdict(numerics):
            raise CheckpointError(
                f"{path / STATE}: numerics is {facts['numerics']}, this engine runs {asdict(numerics)}"
            )
        param = layout.flat(read_adapter(path, layout.config, layout.spec.rank, dtype, device), dtype, device)
        moments = load_file(path / MOMENTS)
        m, v = (moments[name].to(device=device, dtype=dtype) for name in ("m", "v"))
        if m.shape != param.shape or v.shape != param.shape:
            raise CheckpointError(f"{path / MOMENTS}: moments have {m.numel()} values, the adapter {param.numel()}")
        if not torch.isfinite(m).all() or not (torch.isfinite(v) & (v >= 0)).all():
            raise CheckpointError(f"{path / MOMENTS}: moments are not finite, or squares below zero")
        updates, step, seq_no = (int(facts[name]) for name in ("updates", "step", "seq_no"))
        if min(updates, step, seq_no) < 0:
            raise CheckpointError(f"{path / STATE}: updates, step or seq_no is below 0: {updates}, {step}, {seq_no}")
        files = {name: (path / name).read_text() for name in facts["files"]}
        return TrainingState(param, AdamState(m, v, updates), step, seq_no), files
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, AdapterFolderError) as error:
        raise CheckpointError(f"{path}: not a checkpoint of this job ({error})") from error
