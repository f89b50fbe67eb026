"""How a job begins: with fresh weights, with those of an adapter that was trained before, or where a checkpoint left
off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from coserve_engine.config import LINEARS
from coserve_engine.errors import AdapterFolderError, CheckpointError
from coserve_engine.formats.adapter_config import read_adapter_config
from coserve_engine.formats.adapter_folder import module_name, read_adapter
from coserve_engine.job_messages import Continued, LoraSpec, StartJob
from coserve_engine.model.executor import Executor
from coserve_engine.tensors.adam import AdamState
from coserve_engine.tensors.lora import Factors, LoraLayout
from coserve_engine.training.checkpoint import TrainingState, load_checkpoint

T = TypeVar("T")
HOST = torch.device("cpu")


class Beginning(NamedTuple):
    """What a job begins with; `files` came back from the checkpoint."""

    layout: LoraLayout
    state: TrainingState
    files: dict[str, str]


def begin(command: StartJob, executor: Executor) -> Beginning:
    """What `command` asks for. Reads files; any thread.

    Raises:
        CheckpointError: the checkpoint is corrupt or of another run (OtherArithmeticError: that computed otherwise).
        AdapterFolderError: the adapter to go on from cannot be read, or trained here, or is not what the job says.
    """
    lora, dtype, carry = command.lora, executor.dtypes.lora, executor.copies.carry
    if command.resume is not None:

        def layout_of(found: LoraSpec) -> LoraLayout:
            _check_resumed(lora, found)
            return executor.layout(replace(found, dropout=lora.dropout))

        layout, state, files = load_checkpoint(Path(command.resume), layout_of, executor.config)
        return Beginning(layout, state.moved(lambda values: carry([values])[0]), files)
    if isinstance(lora, LoraSpec):
        layout = executor.layout(lora)
        param = layout.fresh(command.seed, dtype, HOST)
    else:
        folder = Path(lora.path)
        layers = read_adapter(folder, executor.model, executor.config.max_rank, dtype)
        spec = _shape(folder, layers, lora.dropout)
        wrong = difference(lora, spec)
        if wrong is not None:
            raise AdapterFolderError(f"{folder}: {wrong}")
        layout = executor.layout(spec)
        param = layout.flat(layers, dtype, HOST)
    (param,) = carry([param])
    return Beginning(layout, TrainingState(param, AdamState.zeros(param), 0, 0), {})


def _check_resumed(lora: LoraSpec | Continued, found: LoraSpec) -> None:
    if isinstance(lora, Continued):
        wrong = difference(lora, found)
        if wrong is not None:
            raise CheckpointError(wrong)
    elif found != lora:
        raise CheckpointError(f"lora is {found}, the job says {lora}")


def difference(wanted: Continued, found: LoraSpec) -> str | None:
    """What the job says and the adapter to go on from is not, if anything."""
    targets = None if wanted.targets is None else sorted(wanted.targets)
    for field, mine, theirs in (
        ("rank", wanted.rank, found.rank),
        ("alpha", wanted.alpha, found.alpha),
        ("targetModules", targets, sorted(found.targets)),
        ("useRslora", wanted.use_rslora, found.use_rslora),
    ):
        if mine is not None and mine != theirs:
            return (
                f"the job's adapter.{field} is {mine}, and that of the adapter it goes on from is {theirs}; leave it "
                "out, which takes it over"
            )
    return None


def _shape(folder: Path, layers: Sequence[Mapping[str, Factors]], dropout: float) -> LoraSpec:
    """The shape of the adapter in `folder`, which a job can train if it is the same in all layers and linears."""
    config = read_adapter_config(folder)
    targets = tuple(name for name in LINEARS if name in layers[0])
    for index, layer in enumerate(layers):
        if layer.keys() != layers[0].keys():
            raise AdapterFolderError(
                f"{folder}: layer {index} adapts {sorted(layer)}, layer 0 {sorted(layers[0])} (target_modules, "
                "layers_to_transform); a job trains the same linears in every layer: go on from an adapter that does"
            )
    modules = [module_name(index, name) for index, layer in enumerate(layers) for name in layer]
    return LoraSpec(
        _one(folder, "rank", "rank_pattern", modules, config.rank_of),
        _one(folder, "alpha", "alpha_pattern", modules, config.alpha_of),
        targets,
        dropout,
        config.use_rslora,
    )


def _one(folder: Path, what: str, field: str, modules: Sequence[str], of: Callable[[str], T]) -> T:
    """What all modules have in common."""
    first = of(modules[0])
    for module in modules:
        if of(module) != first:
            raise AdapterFolderError(
                f"{folder}: {field} gives {module} {what} {of(module)}, and {modules[0]} has {first}; a job trains one "
                f"{what} for all: go on from an adapter without {field}"
            )
    return first
