"""A Llama of about 32 million parameters with random weights, for benchmarks: speed does not depend on the values."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 8192


def write_random_model(
    folder: Path,
    *,
    layers: int = 8,
    positions: int = 2048,
    hidden: int = 512,
    intermediate: int = 1408,
    heads: int = 8,
    kv_heads: int = 4,
    vocabulary: int = VOCAB,
    tied: bool = False,
) -> Path:
    """Write a Hugging Face folder in float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        eos_token_id=None,
        bos_token_id=None,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
