"""A model that says what it was made to say: its next token follows from the last one alone. Nothing is trained; each
token is one dimension, and the output weights lead from it to the next.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from small_models import CONTEXT, SPECIAL, write_tokenizer
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from transformers import LlamaConfig, LlamaForCausalLM

HIDDEN = 512
SURE = 5.0


def write_scripted(
    folder: Path, template: str, scripts: Mapping[str, Sequence[str]], special: Collection[str] = ()
) -> Path:
    """A model that answers a prompt which ends in one of the words of `scripts` with its pieces, and ends. Each piece
    is a token, a `special` one or not; no two are the same, since each has one that follows it.
    """
    write_tokenizer(folder, template)
    path = str(folder / "tokenizer.json")
    backend = Backend.from_file(path)
    pieces = [one for word, said in scripts.items() for one in (word, *said)]
    assert len(set(pieces)) == len(pieces)
    backend.add_tokens([AddedToken(one, normalized=False, special=one in special) for one in pieces])
    backend.save(path)
    size = backend.get_vocab_size()
    follows = torch.zeros(size, HIDDEN)
    for word, said in scripts.items():
        row = [*(backend.token_to_id(one) for one in (word, *said)), SPECIAL.index("<|end|>")]
        for token, following in pairwise(row):
            follows[following, token] = SURE
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=1, num_attention_heads=8,
            num_key_value_heads=2, max_position_embeddings=CONTEXT, eos_token_id=SPECIAL.index("<|end|>"),
            pad_token_id=0, bos_token_id=None, tie_word_embeddings=False,
        )
    )  # fmt: skip
    with torch.no_grad():
        for weights in model.model.layers.parameters():
            weights.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, HIDDEN))
        model.lm_head.weight.copy_(follows)
    model.save_pretrained(folder)
    return folder
