"""Folders that outlive a process: written beside their final name, synced, renamed, and covered by a
manifest of checksums.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from coserve_engine.config import LINEARS
from coserve_engine.errors import AdapterFolderError
from coserve_engine.folders import MANIFEST, digest, replace_folder
from coserve_engine.lora import LoraLayout
from coserve_engine.messages import LoraSpec
from coserve_engine.model_fields import is_finite_number

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


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
    scratch.mkdir(parents=True)
    for name, text in texts.items():
        (scratch / name).write_text(text)
    for name, values in tensors.items():
        (scratch / name).write_bytes(save(values))  # save_file would hold the interpreter while the disk is slow
    names = sorted([*texts, *tensors])
    files = {n: {"sha256": digest(scratch / n), "bytes": (scratch / n).stat().st_size} for n in names}
    (scratch / MANIFEST).write_text(json.dumps({"version": 1, "files": files}, indent=1, sort_keys=True))
    for name in [*names, MANIFEST]:
        _sync(scratch / name)
    _sync(scratch)
    replace_folder(scratch, path)
    for folder in (path.parent, *(folder.parent for folder in made)):
        _sync(folder)
    return digest(path / MANIFEST)


def _block(name: str) -> str:
    return "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"


def _tensor_name(layer: int, name: str, part: str) -> str:
    return f"base_model.model.model.layers.{layer}.{_block(name)}.{name}.lora_{part}.weight"


def peft_files(
    layout: LoraLayout, flat: torch.Tensor, base_model_name: str
) -> tuple[dict[str, str], dict[str, dict[str, torch.Tensor]]]:
    """An adapter in PEFT's format, for `write_folder`: A and B unscaled, without the padding of the rank."""
    spec = layout.spec
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "target_modules": list(layout.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": spec.use_rslora,
        "use_dora": False,
        "modules_to_save": None,
    }
    tensors = {}
    for index, layer in enumerate(layout.views(flat)):
        for name, (a, b) in layer.items():
            tensors[_tensor_name(index, name, "A")] = a[: spec.rank].float().cpu().contiguous()
            tensors[_tensor_name(index, name, "B")] = b[:, : spec.rank].float().cpu().contiguous()
    return {ADAPTER_CONFIG: json.dumps(config, indent=1)}, {ADAPTER_WEIGHTS: tensors}


def read_peft_config(folder: Path, max_rank: int) -> LoraSpec:
    """Parse adapter_config.json.

    Raises:
        AdapterFolderError: not a plain LoRA adapter, or its rank is above `max_rank`.
    """
    path = folder / ADAPTER_CONFIG
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
        rank, alpha, targets = raw["r"], raw["lora_alpha"], raw["target_modules"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterFolderError(f"{path}: not readable as a PEFT adapter's configuration ({error!r})") from None
    refused: dict[str, object] = {
        "use_dora": False,
        "modules_to_save": None,
        "bias": "none",
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "alora_invocation_tokens": None,
    }
    for field, allowed in {"peft_type": "LORA", "fan_in_fan_out": False, **refused}.items():
        if raw.get(field) not in (allowed, None) and raw.get(field):
            raise AdapterFolderError(f"{path}: {field} is {raw[field]!r}; only {allowed!r} is supported")
    initial = raw.get("init_lora_weights")
    if isinstance(initial, str) and initial not in ("gaussian", "orthogonal", "eva"):
        raise AdapterFolderError(
            f"{path}: init_lora_weights is {initial!r}, which changes the base model; convert it to plain LoRA"
        )
    if not isinstance(targets, list) or not targets or any(name not in LINEARS for name in targets):
        raise AdapterFolderError(
            f"{path}: target_modules is {targets!r}; it must be a list of names among {list(LINEARS)}"
        )
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise AdapterFolderError(f"{path}: r is {rank!r}; it must be a whole number")
    if not 1 <= rank <= max_rank:
        raise AdapterFolderError(f"{path}: r is {rank}; this endpoint allows 1 to {max_rank} (finetuning.maxRank)")
    if not is_finite_number(alpha):
        raise AdapterFolderError(f"{path}: lora_alpha is {alpha!r}; it must be a finite number")
    use_rslora = bool(raw.get("use_rslora"))
    return LoraSpec(rank, float(alpha), tuple(n for n in LINEARS if n in targets), use_rslora=use_rslora)


def read_peft_weights(folder: Path, layout: LoraLayout, dtype: torch.dtype) -> torch.Tensor:
    """adapter_model.safetensors as a flat buffer [layout.size].

    Raises:
        AdapterFolderError: a tensor is missing, unknown, of another shape, or not finite.
    """
    path = folder / ADAPTER_WEIGHTS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise AdapterFolderError(f"{path}: not readable as safetensors ({error})") from None
    flat, rank = torch.zeros(layout.size, dtype=dtype), layout.spec.rank
    for index, layer in enumerate(layout.views(flat)):
        for name, (a, b) in layer.items():
            for part, target in (("A", a[:rank]), ("B", b[:, :rank])):
                key = _tensor_name(index, name, part)
                if key not in tensors:
                    raise AdapterFolderError(f"{path}: tensor {key!r} is missing; was it trained on another model?")
                value = tensors.pop(key)
                if value.shape != target.shape:
                    raise AdapterFolderError(
                        f"{path}: tensor {key!r} has shape {tuple(value.shape)}, this model needs {tuple(target.shape)}"
                    )
                if not torch.isfinite(value).all():
                    raise AdapterFolderError(f"{path}: tensor {key!r} has values that are not finite")
                target.copy_(value)
    if tensors:
        raise AdapterFolderError(f"{path}: tensor {min(tensors)!r} has no place in this model")
    return flat
