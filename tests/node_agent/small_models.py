"""Small random models, each with a tokenizer of its own: bytes, or pieces as sentencepiece makes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

CONTEXT = 256
SPECIAL = ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>")
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}<|end|>"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|end|>"
    "{% else %}{{ raise_exception('no role ' ~ message['role']) }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED_TEMPLATE = PLAIN_TEMPLATE.replace(
    "<|assistant|>{{ message['content'] }}<|end|>",
    "<|assistant|>{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}",
)
TEXTS = ["the quick brown fox jumps over the lazy dog", "héllo wörld 你好 😀", "one two three four five six seven"]


def write_tokenizer(folder: Path, template: str) -> int:
    """A byte-level BPE of some 300 tokens; returns its size."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[3],
        "pad_token": SPECIAL[0],
        "additional_special_tokens": list(SPECIAL[1:3]),
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return int(backend.get_vocab_size())


BEGIN, END = "<s>", "</s>"
INSTRUCT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} "
    "[/INST]{% else %} {{ message['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)


def write_sentencepiece(folder: Path, template: str = INSTRUCT_TEMPLATE) -> int:
    """A tokenizer like Llama 2's: spaces are part of words, the decoder strips the one before the first word, and
    what has no token is spelt in bytes.
    """
    to_pieces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = Backend(models.BPE(unk_token="<unk>"))
    trained.normalizer = to_pieces
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog", "one two three four five six seven", "hello world [INST] é"]
        * 3,
        trainers.BpeTrainer(vocab_size=160, special_tokens=["<unk>"], show_progress=False),
    )
    learnt = json.loads(trained.to_str())["model"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    words = [piece for piece, _ in sorted(learnt["vocab"].items(), key=lambda item: item[1]) if piece != "<unk>"]
    vocab = {piece: n for n, piece in enumerate(["<unk>", BEGIN, END, *bytes_, *words])}
    merges = [tuple(pair) for pair in learnt["merges"]]
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = to_pieces
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", BEGIN, END])
    backend.post_processor = processors.TemplateProcessing(f"{BEGIN} $A", f"{BEGIN} $A {BEGIN} $B", [(BEGIN, 1)])
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return int(backend.get_vocab_size())


def write_model(
    folder: Path,
    template: str = MARKED_TEMPLATE,
    write: Callable[[Path, str], int] = write_tokenizer,
    eos_token_id: int = 3,
) -> Path:
    size = write(folder, template)
    torch.manual_seed(7)
    transformers_logging.disable_progress_bar()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            initializer_range=0.15,
            eos_token_id=eos_token_id,
            pad_token_id=0,
            bos_token_id=None,
            tie_word_embeddings=False,
        )
    )
    model.save_pretrained(folder)
    return folder
