"""The frozen weights, loaded from safetensors and checked against config.json tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from coserve_engine.config import LINEARS, ModelConfig
from coserve_engine.errors import ModelFolderError


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """`linears[name]` [out, in]; norms [hidden]."""

    linears: Mapping[str, torch.Tensor]
    input_norm: torch.Tensor
    post_norm: torch.Tensor


@dataclass(frozen=True, slots=True)
class Weights:
    """embed and head [vocab, hidden] (one tensor where tied), norm [hidden]."""

    embed: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    head: torch.Tensor


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
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
            raise ModelFolderError(f"{folder / name}: no such file; copy the model folder again")
    return [folder / name for name in names]


def load_weights(folder: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Weights:
    """Read every tensor of `config` from `folder` as `dtype` on `device`.

    Raises:
        ModelFolderError: a file is truncated, a tensor is missing, or its shape disagrees with config.json.
    """
    tensors: dict[str, tuple[Path, torch.Tensor]] = {}
    for path in _files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (not a mapping)
                    tensors[name] = (path, file.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise ModelFolderError(f"{path}: broken or truncated safetensors ({error}); copy the file again") from None

    def take(name: str, *shape: int) -> torch.Tensor:
        if name not in tensors:
            raise ModelFolderError(f"{folder}: tensor {name!r} is missing from the safetensors files; copy them again")
        path, tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise ModelFolderError(
                f"{path}: tensor {name!r} has shape {tuple(tensor.shape)}, but config.json implies {shape}"
            )
        return tensor.to(device=device, dtype=dtype).contiguous()

    def layer(i: int) -> LayerWeights:
        prefix = f"model.layers.{i}."
        block = {n: "mlp" if n in ("gate_proj", "up_proj", "down_proj") else "self_attn" for n in LINEARS}
        return LayerWeights(
            {n: take(f"{prefix}{block[n]}.{n}.weight", *config.linear_shape(n)) for n in LINEARS},
            take(f"{prefix}input_layernorm.weight", config.hidden),
            take(f"{prefix}post_attention_layernorm.weight", config.hidden),
        )

    embed = take("model.embed_tokens.weight", config.vocab_size, config.hidden)
    head = embed if config.tied else take("lm_head.weight", config.vocab_size, config.hidden)
    return Weights(embed, tuple(layer(i) for i in range(config.layers)), take("model.norm.weight", config.hidden), head)
