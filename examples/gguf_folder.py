"""SmolLM2's GGUF file as a Hugging Face folder: weights in bf16, tokenizer, chat template, configuration.

transformers expands a GGUF file and will not save it again, so the files are written out here.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps"),
    *("attention_bias", "mlp_bias", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
)


def write_folder(gguf: Path, folder: Path) -> None:
    """Write everything; `folder` exists."""
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # tokenizer.ggml.pre is "smollm", which transformers does not read: every digit is a token of its own
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    state = model.state_dict()
    del state["lm_head.weight"]  # tied
    weights = {name: value.to(torch.bfloat16).contiguous() for name, value in state.items()}
    # written by ourselves: save_file's file is its owner's alone, and pods run as another
    (folder / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    fields = {name: getattr(model.config, name) for name in FIELDS}
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    files: dict[str, dict[str, Any]] = {
        "config.json": {
            **fields,
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "rope_theta": model.config.rope_parameters["rope_theta"],
            "torch_dtype": "bfloat16",
        },
        "generation_config.json": {name: fields[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "special_tokens_map.json": special,
        "tokenizer_config.json": {
            **special,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": fields["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "chat_template": tokenizer.chat_template,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
