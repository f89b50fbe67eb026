"""Shapes of small models, and random adapters and tokens for them. Nothing here needs a reference's library, so that it
runs where only the engine does.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch

from coserve_engine.config import LINEARS
from coserve_engine.messages import LoraSpec
from coserve_engine.model.executor import Executor
from coserve_engine.tensors.lora import LoraLayout, LoraWeights

VOCAB = 128
PLAIN: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
    "initializer_range": 0.12,
    "eos_token_id": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "wide": {"head_dim": 32, "num_key_value_heads": 1},
    "llama31": {
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral": {"model_type": "mistral", "head_dim": 24, "sliding_window": 50},
    "qwen2": {
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 70,
        "max_window_layers": 1,
    },
    "qwen3": {
        "model_type": "qwen3",
        "head_dim": 32,
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    },
    "smol": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
        "initializer_range": 0.04,
    },
}
"""plain: grouped queries, a head of its own; wide: heads * head size is not the hidden size; llama31: biases, stretched
rotary embedding; mistral: windows shorter than a tile; qwen2: biases of q, k, v, a window in the second layer only;
qwen3: norms of queries and keys; smol: real widths.
"""


@dataclass(frozen=True)
class Adapter:
    """Random LoRA weights as the engine sees them."""

    layout: LoraLayout
    flat: torch.Tensor

    @property
    def weights(self) -> LoraWeights:
        return LoraWeights.trained(self.layout, self.flat)


class Computed(Adapter):
    """An adapter that is computed with in bfloat16."""

    @property
    def weights(self) -> LoraWeights:
        return LoraWeights.trained(self.layout, self.flat, torch.bfloat16)


def draw_adapter(executor: Executor, rank: int = 4, seed: int = 0, targets: tuple[str, ...] = LINEARS) -> Adapter:
    """In the executor's dtype; neither A nor B is zero."""
    layout = executor.layout(LoraSpec(rank, 2.0 * rank, targets))
    flat = layout.fresh(seed, executor.dtype, executor.device)
    generator = torch.Generator().manual_seed(seed)
    for layer in layout.views(flat):
        for _, b in layer.values():
            b[:, :rank] = 0.1 * torch.randn(b.shape[0], rank, generator=generator)
    return Adapter(layout, flat)


def draw_sequence(seed: int, count: int) -> tuple[int, ...]:
    """`count` tokens of the small vocabulary, never its end-of-text."""
    source = random.Random(seed)
    return tuple(source.randrange(3, VOCAB) for _ in range(count))
