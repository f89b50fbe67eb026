"""Model folders with random weights, without transformers; and models without a file, drawn where they compute."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from random_models import PLAIN
from safetensors.torch import save_file

from coserve_engine.formats.model_folder import read_model_config
from coserve_engine.model import loading

SAME = {"hidden_act": "silu", "rms_norm_eps": 1e-5}
MEDIUM: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "initializer_range": 0.04,
}
"""Heads of 128, as large models have them."""
LLAMA_31_8B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "eos_token_id": 128001,
}


def write_config(folder: Path, fields: Mapping[str, Any]) -> Path:
    """config.json alone."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {"architectures": [f"{fields['model_type'].capitalize()}ForCausalLM"], **SAME, **fields}
    (folder / "config.json").write_text(json.dumps(named))
    return folder


def write_model(folder: Path, fields: Mapping[str, Any]) -> Path:
    """With weights that bfloat16 holds, and norms and biases uneven enough for a mistake to show."""
    fields = {**PLAIN, **fields}
    shapes = loading.tensor_shapes(read_model_config(write_config(folder, fields)))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        drawn = torch.randn(shape, generator=generator)
        if "norm" in name:
            drawn = 1 + 0.2 * drawn
        else:
            drawn *= 0.2 if name.endswith("bias") else fields["initializer_range"]
        tensors[name] = drawn.bfloat16()
    if fields["tie_word_embeddings"]:
        del tensors[loading.HEAD]
    save_file(tensors, folder / "model.safetensors")
    return folder


@contextmanager
def drawn_weights() -> Iterator[None]:
    """Models that are loaded in the block need no weights on disk: 16 GB would take most of a short run."""

    def drawn(
        folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in shapes.items():
            tensor = torch.empty(shape, dtype=dtype, device=device)
            yield name, tensor.fill_(1.0) if "norm" in name else tensor.normal_(0.0, 0.02)

    with mock.patch.object(loading, "read_tensors", drawn):
        yield
