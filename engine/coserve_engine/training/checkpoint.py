"""A job's state between two optimizer steps: adapter (PEFT), moments, the best weights so far where the driver had them
kept, counters, and what the driver wants back.

Nothing of a pass is saved: passes since the last optimizer step are replayed, and replay is exact.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from coserve_engine.config import LINEARS, EngineConfig
from coserve_engine.errors import AdapterFolderError, CheckpointError, OtherArithmeticError
from coserve_engine.formats.adapter_folder import read_adapter
from coserve_engine.formats.artifacts import peft_files, write_folder
from coserve_engine.formats.folders import verify_folder
from coserve_engine.formats.model_fields import is_finite_number
from coserve_engine.formats.opened import read_text
from coserve_engine.formats.tensor_file import load_tensors
from coserve_engine.limits import shown
from coserve_engine.messages import LoraSpec
from coserve_engine.tensors.adam import AdamState, counted
from coserve_engine.tensors.dtypes import Dtypes
from coserve_engine.tensors.lora import LoraLayout

HOST = torch.device("cpu")
STATE = "state.json"
MOMENTS = "optimizer.safetensors"
BEST = "best.safetensors"
FILE_BYTES = 1 << 30
"""Of a file of the driver's: its log has a line a step."""
MOST_STEPS = 2**53
_NOT_LIKE_OURS = (ValueError, KeyError, TypeError, RecursionError)
"""What reading a file raises that holds something else than `save_checkpoint` writes."""


class Best(NamedTuple):
    """The parameters [size] as they were after `step` optimizer steps; they never change."""

    step: int
    param: torch.Tensor


@dataclass(frozen=True, slots=True)
class TrainingState:
    """What a checkpoint holds: copies, so that training goes on while they are written."""

    param: torch.Tensor
    adam: AdamState
    step: int
    seq_no: int
    best: Best | None = None

    def copy(self) -> TrainingState:
        return replace(self, param=self.param.clone(), adam=self.adam.copy())

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> TrainingState:
        """With what `move` makes of each tensor."""
        adam = AdamState(*map(move, (self.adam.m, self.adam.v, self.adam.updates)))
        best = None if self.best is None else self.best._replace(param=move(self.best.param))
        return replace(self, param=move(self.param), adam=adam, best=best)


def save_checkpoint(
    path: Path, layout: LoraLayout, state: TrainingState, config: EngineConfig, files: dict[str, str]
) -> str:
    """Write folder `path`, of a job in an engine of `config` whose `state` is on the host; returns the sha256 of its
    manifest.
    """
    texts, tensors = peft_files(layout, state.param, config.model_path)
    facts = {
        "version": 1,
        "step": state.step,
        "seq_no": state.seq_no,
        "updates": int(state.adam.updates),
        "lora": asdict(layout.spec),
        "numerics": asdict(config.numerics),
        "dtype": config.dtype,
        "files": sorted(files),
    }
    tensors |= {MOMENTS: {"m": state.adam.m, "v": state.adam.v}}
    if state.best is not None:
        facts["best_step"] = state.best.step
        tensors[BEST] = {"param": state.best.param}
    texts |= {**files, STATE: json.dumps(facts, indent=1)}
    return write_folder(path, texts, tensors)


def _check_arithmetic(path: Path, facts: dict[str, Any], config: EngineConfig) -> None:
    """Refuse `facts` of file `path` that come of other arithmetic. Engines that knew no dtype computed in float32."""
    dtype = facts.get("dtype", "float32")
    for field, theirs, mine, remedy in (
        ("dtype", dtype, config.dtype, f"set engine.dtype of the endpoint to {dtype}"),
        ("numerics", facts["numerics"], asdict(config.numerics), "run the version of coserve that wrote it"),
    ):
        if theirs != mine:
            raise OtherArithmeticError(
                f"{path}: {field} is {theirs}, and this engine's is {mine}, so that the job would go on with other "
                f"arithmetic; {remedy} and create the job again, or name this folder, which is an adapter too, in "
                "adapter.from of a new job"
            )


def load_checkpoint(
    path: Path, layout_of: Callable[[LoraSpec], LoraLayout], config: EngineConfig
) -> tuple[LoraLayout, TrainingState, dict[str, str]]:
    """Read and check folder `path`; the state is on the host. `layout_of` gives the layout of its LoRA shape, or
    refuses that by CheckpointError.

    Raises:
        OtherArithmeticError: it belongs to a run with another dtype or other tile sizes.
        CheckpointError: it is corrupt, or belongs to a run with another LoRA shape.
    """
    verify_folder(path)
    dtype = Dtypes.of(config.dtype).lora
    try:
        facts: dict[str, Any] = json.loads(read_text(path, STATE))
        found = _lora_of(facts["lora"], config.max_rank)
        try:
            layout = layout_of(found)
        except CheckpointError as error:
            raise CheckpointError(f"{path / STATE}: {error}") from None
        _check_arithmetic(path / STATE, facts, config)
        param = layout.flat(read_adapter(path, layout.config, layout.spec.rank, dtype), dtype, HOST)
        moments = load_tensors(path, MOMENTS, 2 * param.numel())
        m, v = (moments[name].to(dtype) for name in ("m", "v"))
        if m.shape != param.shape or v.shape != param.shape:
            raise CheckpointError(f"{path / MOMENTS}: moments have {m.numel()} values, the adapter {param.numel()}")
        if not torch.isfinite(m).all() or not (torch.isfinite(v) & (v >= 0)).all():
            raise CheckpointError(f"{path / MOMENTS}: moments are not finite, or squares below zero")
        updates, step, seq_no = (int(facts[name]) for name in ("updates", "step", "seq_no"))
        if not 0 <= min(updates, step, seq_no) <= max(updates, step, seq_no) <= MOST_STEPS:
            raise CheckpointError(
                f"{path / STATE}: updates, step or seq_no is not from 0 to {MOST_STEPS}: {updates}, {step}, {seq_no}"
            )
        best = _best(path, facts, param)
        files = {name: read_text(path, name, FILE_BYTES) for name in facts["files"]}
        return layout, TrainingState(param, AdamState(m, v, counted(updates, HOST)), step, seq_no, best), files
    except (OSError, ArithmeticError, AttributeError, AdapterFolderError, *_NOT_LIKE_OURS) as error:
        raise CheckpointError(f"{path}: not a checkpoint of this job ({error})") from error


def _lora_of(raw: Any, max_rank: int) -> LoraSpec:
    """The LoRA shape that a checkpoint says; ValueError where no job here can have it."""
    rank, alpha, targets, use_rslora = raw["rank"], raw["alpha"], raw["targets"], raw.get("use_rslora", False)
    if type(rank) is not int or not 1 <= rank <= max_rank:
        raise ValueError(f"lora.rank is {shown(rank)}; it must be a whole number from 1 to {max_rank}")
    if not is_finite_number(alpha) or type(use_rslora) is not bool:
        raise ValueError("lora.alpha must be a finite number, lora.use_rslora true or false")
    if not targets or any(name not in LINEARS for name in targets):
        raise ValueError(f"lora.targets must be some of {list(LINEARS)}")
    return LoraSpec(rank, alpha, tuple(targets), use_rslora=use_rslora)


def _best(path: Path, facts: dict[str, Any], like: torch.Tensor) -> Best | None:
    """What KeepBest kept; checkpoints of engines that knew no such command have none."""
    if facts.get("best_step") is None:
        return None
    step, param = int(facts["best_step"]), load_tensors(path, BEST, like.numel())["param"].to(like)
    if param.shape != like.shape or not torch.isfinite(param).all():
        raise CheckpointError(f"{path / BEST}: has {param.numel()} values of {like.numel()}, or some are not finite")
    if not 0 <= step <= int(facts["step"]):
        raise CheckpointError(f"{path / STATE}: best_step is {step}, and step {facts['step']}")
    return Best(step, param)
