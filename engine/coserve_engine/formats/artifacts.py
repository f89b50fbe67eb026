"""Folders that outlive a process: written beside their final name, synced, renamed, and covered by a
manifest of checksums.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save

from coserve_engine.formats.adapter_config import ADAPTER_CONFIG
from coserve_engine.formats.adapter_folder import ADAPTER_WEIGHTS, module_name, tensor_name
from coserve_engine.formats.folders import MANIFEST, digest, replace_folder, seal_folder
from coserve_engine.formats.peft_config import config_text
from coserve_engine.tensors.lora import LoraLayout


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_folder(path: Path, texts: Mapping[str, str], tensors: Mapping[str, dict[str, torch.Tensor]]) -> str:
    """Write files (name -> text, name -> tensors) and their manifest as folder `path`; an older one is replaced whole.

    Returns:
        The sha256 of the manifest, which covers every file.
    """
    scratch = path.with_name(f".{path.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        _fill(scratch, texts, tensors)
    except OSError:
        shutil.rmtree(scratch, ignore_errors=True)  # of a volume that is full, the half of a checkpoint is a waste
        raise
    replace_folder(scratch, path)
    for folder in (path.parent, *(folder.parent for folder in made)):
        _sync(folder)
    return digest(path / MANIFEST)


def _fill(scratch: Path, texts: Mapping[str, str], tensors: Mapping[str, dict[str, torch.Tensor]]) -> None:
    scratch.mkdir(parents=True)
    for name, text in texts.items():
        (scratch / name).write_text(text)
    for name, values in tensors.items():
        (scratch / name).write_bytes(save(values))  # save_file would hold the interpreter while the disk is slow
    seal_folder(scratch)
    for name in [*texts, *tensors, MANIFEST]:
        _sync(scratch / name)
    _sync(scratch)


def peft_files(
    layout: LoraLayout, flat: torch.Tensor, base_model_name: str
) -> tuple[dict[str, str], dict[str, dict[str, torch.Tensor]]]:
    """An adapter in PEFT's format, for `write_folder`, of parameters on the host: A and B unscaled, without the padding
    of the rank.
    """
    spec = layout.spec
    tensors = {}
    for index, layer in enumerate(layout.views(flat)):
        for name, (a, b) in layer.items():
            module = module_name(index, name)
            tensors[tensor_name(module, "A")] = a[: spec.rank].float().contiguous()
            tensors[tensor_name(module, "B")] = b[:, : spec.rank].float().contiguous()
    return {ADAPTER_CONFIG: config_text(spec, layout.targets, base_model_name)}, {ADAPTER_WEIGHTS: tensors}
