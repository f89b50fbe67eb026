"""The tensors of a model folder's safetensors files, one at a time, each checked against what config.json implies."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from coserve_engine.errors import ModelFolderError

log = logging.getLogger(__name__)

FLOATS = ("F64", "F32", "BF16", "F16")
INDEX = "model.safetensors.index.json"
OTHER_WEIGHTS = (".bin", ".gguf", ".pt", ".pth")
IGNORED = ".rotary_emb.inv_freq"
"""Old folders hold these; config.json says the same."""


def read_tensors(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value, as `dtype` on `device`, of every tensor of `folder`; `shapes` has those that may be there.

    Each is a copy: what safetensors returns is the file itself, and would change with it. It goes to the device as it
    is stored, tensor by tensor, and is converted there: the host never holds a second copy of a shard.

    Raises:
        ModelFolderError: a file is missing or truncated, or a tensor has no place in the model, is there twice, is of
            another shape or type, or is not finite.
    """
    seen: set[str] = set()
    paths = weight_files(folder)
    for number, path in enumerate(paths, start=1):
        log.info("reading %s (%d of %d, %s bytes)", path.name, number, len(paths), f"{path.stat().st_size:,}")
        for name, stored in _read(path, shapes):
            if name in seen:
                raise ModelFolderError(f"{path}: tensor {name!r} is in another file too; copy the model folder again")
            seen.add(name)
            moved = stored.to(device)
            tensor = moved.to(dtype, copy=moved is stored)
            if not _finite(tensor):
                remedy = "copy the file again, or use another version of the model"
                if dtype is torch.bfloat16 and _finite(moved):
                    remedy = "set engine.dtype to float32"
                as_what = str(dtype).removeprefix("torch.")
                raise ModelFolderError(f"{path}: tensor {name!r} has values that are not finite as {as_what}; {remedy}")
            yield name, tensor


def _finite(tensor: torch.Tensor) -> bool:
    low, high = tensor.aminmax()  # NaN if any is
    return bool(low.isfinite() and high.isfinite())


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the model's weights; ModelFolderError where one is missing."""
    index = folder / INDEX
    if index.exists():
        try:
            names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelFolderError(
                f"{index}: not a safetensors index ({error!r}); copy the model folder again"
            ) from None
    else:
        names = ["model.safetensors"]
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise ModelFolderError(f"{folder / name}: no such file; {_remedy(folder, name)}")
    return [folder / name for name in names]


def _remedy(folder: Path, name: str) -> str:
    """What to do about weights that are not there, by what is."""
    if (folder / name).is_symlink():
        return (
            f"it is a link to {(folder / name).readlink()}, as in a download's cache: copy what its links lead to "
            "(cp -rL), all of it below the model's folder"
        )
    beside = {path.suffix: path.name for path in sorted(folder.iterdir()) if path.is_file()}
    if ".safetensors" in beside:
        return f"{beside['.safetensors']} is there: copy the rest of the folder, {INDEX} too where it has several"
    for suffix in OTHER_WEIGHTS:
        if suffix in beside:
            return (
                f"{beside[suffix]} is no safetensors: save the model with transformers' save_pretrained, and copy that"
            )
    return "copy the model folder again"


def _read(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of the tensors of one file, checked before they are read."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                if name.endswith(IGNORED):
                    continue
                _check(path, name, file.get_slice(name), shapes.get(name))
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ModelFolderError(f"{path}: broken or truncated safetensors ({error}); copy the file again") from None


def _check(path: Path, name: str, found: Any, shape: tuple[int, ...] | None) -> None:
    """Refuse a tensor, seen as a safetensors slice, that is not of `shape`."""
    if shape is None:
        raise ModelFolderError(
            f"{path}: tensor {name!r} has no place in the model that config.json describes; copy config.json and "
            "weights from the same model"
        )
    if tuple(found.get_shape()) != shape:
        raise ModelFolderError(
            f"{path}: tensor {name!r} has shape {tuple(found.get_shape())}, but config.json implies {shape}; copy "
            "config.json and weights from the same model"
        )
    if found.get_dtype() not in FLOATS:
        raise ModelFolderError(
            f"{path}: tensor {name!r} is of type {found.get_dtype()}; only {', '.join(FLOATS)} are supported: use the "
            "model's unquantized folder"
        )
