"""The engine: serving and token-level finetuning in one forward over one paged KV cache."""
