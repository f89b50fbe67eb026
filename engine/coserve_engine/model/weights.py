"""The frozen weights: what they are called in a model folder, and how they are loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from coserve_engine.config import LINEARS, ModelConfig
from coserve_engine.errors import ModelFolderError
from coserve_engine.formats.model_tensors import read_tensors
from coserve_engine.tensors.weights import FrozenLinear, LayerWeights, Weights

EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_BLOCKS = {name: "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn" for name in LINEARS}


Frozen = Callable[[torch.Tensor, torch.Tensor | None], FrozenLinear]
"""A linear of weight [out, in] and bias [out]."""


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


def load_weights(
    folder: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device, frozen: Frozen
) -> Weights:
    """Read every tensor of `config` from `folder` as `dtype` on `device`; `frozen` makes the linears.

    Raises:
        ModelFolderError: as `read_tensors`, or a tensor is missing, or a tied model has a head that is no embedding.
    """
    shapes = tensor_shapes(config)
    tensors = dict(read_tensors(folder, shapes, dtype, device))
    missing = sorted(shapes.keys() - tensors.keys() - ({HEAD} if config.tied else set()))
    if missing:
        raise ModelFolderError(
            f"{folder}: tensor {missing[0]!r} is missing from the safetensors files; copy them again"
        )
    if config.tied and HEAD in tensors and not torch.equal(tensors[HEAD], tensors[EMBED]):
        raise ModelFolderError(
            f"{folder}: tensor {HEAD!r} differs from {EMBED!r}, but tie_word_embeddings is true; set it to false in "
            "config.json, or copy config.json and weights from the same model"
        )

    def layer(index: int) -> LayerWeights:
        return LayerWeights(
            linears={n: frozen(tensors.pop(_weight(index, n)), tensors.get(_bias(index, n))) for n in LINEARS},
            input_norm=tensors[_layernorm(index, "input")],
            post_norm=tensors[_layernorm(index, "post_attention")],
            q_norm=tensors.get(_head_norm(index, "q")),
            k_norm=tensors.get(_head_norm(index, "k")),
        )

    embed = tensors[EMBED]
    layers = tuple(layer(index) for index in range(config.layers))
    return Weights(embed, layers, tensors[NORM], frozen(embed if config.tied else tensors.pop(HEAD), None))
