"""An adapter folded into its base model: a plain Hugging Face folder that needs neither PEFT nor this engine.

W becomes W + scale * B A as in PEFT's merge_and_unload, summed in float32 and rounded once to the dtype of the weights.
It goes file by file: the host holds one file of the model, not two models.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from coserve_engine.config import LINEARS
from coserve_engine.errors import AdapterFolderError
from coserve_engine.formats.adapter_folder import module_name, read_adapter
from coserve_engine.formats.folders import replace_folder
from coserve_engine.formats.model_folder import read_model_config
from coserve_engine.formats.model_tensors import INDEX, OTHER_WEIGHTS, weight_files
from coserve_engine.tensors.lora import Factors

MOST_RANK = 4096
NOT_COPIED = (".safetensors", *OTHER_WEIGHTS)


def merge(
    model: Path, adapter: Path, target: Path, on_file: Callable[[str, int, int], None] = lambda name, number, of: None
) -> int:
    """Write the model in folder `model` with the adapter (PEFT's format) in folder `adapter` merged in as `target`, an
    absent or empty folder. Cut short, it leaves no `target`. Returns how many linears were changed.

    Args:
        on_file: told before each file of weights: its name, its number from 1, and how many there are.

    Raises:
        AdapterFolderError, ModelFolderError: a folder does not read, or the adapter is not one of this model.
        OSError: `target` cannot be written.
    """
    config = read_model_config(model)
    layers = read_adapter(adapter, config, MOST_RANK, torch.float32)
    factors = {
        module_name(number, linear) + ".weight": layer[linear]
        for number, layer in enumerate(layers)
        for linear in LINEARS
        if linear in layer
    }
    scratch = target.with_name(f".{target.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        _copy_rest(model, scratch)
        files, changed = weight_files(model), 0
        for number, file in enumerate(files, start=1):
            on_file(file.name, number, len(files))
            changed += _merge_file(file, scratch / file.name, factors)
        if changed != len(factors):
            raise AdapterFolderError(
                f"{adapter}: {len(factors) - changed} of its {len(factors)} linears are not in {model} by the names "
                "that transformers gives them; save the model with its save_pretrained"
            )
        if target.exists():
            target.rmdir()  # it is empty
        replace_folder(scratch, target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return changed


def _copy_rest(model: Path, scratch: Path) -> None:
    """All that is no weight: configuration, tokenizer, licence; links are followed."""
    for path in model.iterdir():
        if path.is_file() and (path.name == INDEX or not path.name.endswith((*NOT_COPIED, ".index.json"))):
            shutil.copyfile(path, scratch / path.name)


def _merge_file(source: Path, target: Path, factors: Mapping[str, Factors]) -> int:
    tensors, changed = {}, 0
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata() or {"format": "pt"}
        for name in file.keys():  # noqa: SIM118  (not a mapping)
            tensor = file.get_tensor(name)
            if name in factors:
                tensor, changed = _merged(tensor, factors[name]), changed + 1
            tensors[name] = tensor
    save_file(tensors, target, metadata)
    return changed


def _merged(weight: torch.Tensor, factors: Factors) -> torch.Tensor:
    """In float32, or the weight's own dtype where that is wider."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    a, b = factors.a.to(wide), factors.b.to(wide)
    return (weight.to(wide) + (b @ a) * factors.scale).to(weight.dtype)
