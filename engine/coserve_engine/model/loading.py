"""The frozen weights: what they are called in a model folder, and how they are loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from coserve_engine.config import LINEARS, ModelConfig
from coserve_engine.errors import ModelFolderError
from coserve_engine.formats.model_tensors import read_tensors
from coserve_engine.kernels.protocol import Kernels
from coserve_engine.tensors.weights import FrozenLinear, LayerWeights, Weights

Read = Callable[[Path, Mapping[str, tuple[int, ...]], torch.dtype, torch.device], Iterable[tuple[str, torch.Tensor]]]
"""(folder, shape of each tensor, dtype, device) -> name and value of each, as `read_tensors`."""
EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_BLOCKS = {name: "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn" for name in LINEARS}


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name in the files -> shape of every tensor of the model; a tied head need not be there."""
    rows = (config.vocab_size, config.hidden)
    shapes: dict[str, tuple[int, ...]] = {EMBED: rows, NORM: (config.hidden,), HEAD: rows}
    for layer in range(config.layers):
        for name in LINEARS:
            shapes[_weight(layer, name)] = config.linear_shape(name)
        for name in config.biased:
            shapes[_bias(layer, name)] = config.linear_shape(name)[:1]
        for name in ("input", "post_attention"):
            shapes[_layernorm(layer, name)] = (config.hidden,)
        if config.qk_norm:
            shapes |= {_head_norm(layer, name): (config.head_size,) for name in ("q", "k")}
    return shapes


def _weight(layer: int, name: str) -> str:
    return f"model.layers.{layer}.{_BLOCKS[name]}.{name}.weight"


def _bias(layer: int, name: str) -> str:
    return f"model.layers.{layer}.{_BLOCKS[name]}.{name}.bias"


def _layernorm(layer: int, name: str) -> str:
    return f"model.layers.{layer}.{name}_layernorm.weight"


def _head_norm(layer: int, name: str) -> str:
    return f"model.layers.{layer}.self_attn.{name}_norm.weight"


class _Fused:
    """Weights, and biases where there are any, of groups of linears, into whose slices what is read goes: there is
    never a second copy of more than the last tensors read.
    """

    def __init__(
        self, config: ModelConfig, groups: tuple[tuple[str, ...], ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._whole: dict[tuple[int, tuple[str, ...]], tuple[torch.Tensor, torch.Tensor | None]] = {}
        self.slices: dict[str, torch.Tensor] = {}
        """By name in the files."""
        for layer in range(config.layers):
            for group in groups:
                outs, into = [config.linear_shape(name)[0] for name in group], config.linear_shape(group[0])[1]
                weight = torch.empty(sum(outs), into, dtype=dtype, device=device)
                self.slices |= {
                    _weight(layer, n): part for n, part in zip(group, torch.split(weight, outs), strict=True)
                }
                bias = None
                if set(group) & set(config.biased):
                    bias = torch.zeros(sum(outs), dtype=dtype, device=device)
                    parts = zip(group, torch.split(bias, outs), strict=True)
                    self.slices |= {_bias(layer, name): part for name, part in parts if name in config.biased}
                self._whole[layer, group] = weight, bias

    def take(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor`, or the slice that holds it from now on."""
        place = self.slices.get(name)
        return tensor if place is None else place.copy_(tensor)

    def of(self, layer: int, kernels: Kernels[Any, Any]) -> dict[tuple[str, ...], FrozenLinear]:
        """The groups of a layer."""
        return {group: kernels.frozen(*whole) for (index, group), whole in self._whole.items() if index == layer}


def load_weights(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Kernels[Any, Any],
    read: Read | None = None,
) -> Weights:
    """Read every tensor of `config` from `folder` as `dtype` on `device`; `kernels` makes the linears.

    Args:
        read: in the place of `read_tensors`.

    Raises:
        ModelFolderError: as `read_tensors`, or a tensor is missing, or a tied model has a head that is no embedding.
    """
    shapes = tensor_shapes(config)
    fused = _Fused(config, kernels.fused, dtype, device)
    found = (read or read_tensors)(folder, shapes, dtype, device)
    tensors = {name: fused.take(name, tensor) for name, tensor in found}
    missing = sorted(shapes.keys() - tensors.keys() - ({HEAD} if config.tied else set()))
    if missing:
        tied = ", or set tie_word_embeddings to true in config.json where the embedding is the head"
        raise ModelFolderError(
            f"{folder}: tensor {missing[0]!r} is missing from the safetensors files; copy them again"
            f"{tied if missing == [HEAD] else ''}"
        )
    if config.tied and HEAD in tensors and not torch.equal(tensors[HEAD], tensors[EMBED]):
        raise ModelFolderError(
            f"{folder}: tensor {HEAD!r} differs from {EMBED!r}, but tie_word_embeddings is true; set it to false in "
            "config.json, or copy config.json and weights from the same model"
        )

    def layer(index: int) -> LayerWeights:
        return LayerWeights(
            linears={n: kernels.frozen(tensors.pop(_weight(index, n)), tensors.get(_bias(index, n))) for n in LINEARS},
            input_norm=tensors[_layernorm(index, "input")],
            post_norm=tensors[_layernorm(index, "post_attention")],
            q_norm=tensors.get(_head_norm(index, "q")),
            k_norm=tensors.get(_head_norm(index, "k")),
            fused=fused.of(index, kernels),
        )

    embed = tensors[EMBED]
    layers = tuple(layer(index) for index in range(config.layers))
    return Weights(embed, layers, tensors[NORM], kernels.frozen(embed if config.tied else tensors.pop(HEAD), None))
