"""What a model folder's config.json says, checked, and how an engine is set up."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coserve_engine.errors import ModelFolderError
from coserve_engine.numerics import Numerics

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of a Llama-architecture model. Lengths are counts of elements, `head_size` that of one attention head."""

    vocab_size: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    rms_eps: float
    rope_theta: float
    max_positions: int
    tied: bool
    eos_token_ids: tuple[int, ...]

    def linear_shape(self, name: str) -> tuple[int, int]:
        """(out features, in features) of one of LINEARS."""
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        return {
            "q_proj": (q, self.hidden),
            "k_proj": (kv, self.hidden),
            "v_proj": (kv, self.hidden),
            "o_proj": (self.hidden, q),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }[name]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How to run one engine.

    Args:
        model_path: a Hugging Face folder (config.json, safetensors).
        max_model_length: tokens of prompt and output together.
        max_batch_tokens: rows of one forward.
        max_requests: requests that run at once; others wait.
        kv_cache_bytes: size of the page pool.
        ttft_s, tpot_s: the promise: time to first token, and between tokens, in seconds.
        threads: torch threads.
        finetuning: whether jobs are accepted.
        dtype: "float32" or "float64" (tests).
    """

    model_path: str
    max_model_length: int = 1024
    max_batch_tokens: int = 512
    max_requests: int = 64
    kv_cache_bytes: int = 256 << 20
    ttft_s: float = 1.0
    tpot_s: float = 0.2
    threads: int = 1
    finetuning: bool = True
    max_rank: int = 64
    dtype: str = "float32"
    device: str = "cpu"
    numerics: Numerics = field(default_factory=Numerics)


def read_model_config(folder: Path) -> ModelConfig:
    """Parse `folder`/config.json.

    Raises:
        ModelFolderError: the file is missing, not JSON, lacks a field, or names an architecture that is not supported.
    """
    path = folder / "config.json"
    try:
        loaded: Any = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelFolderError(
            f"{path}: no such file; the model must be a Hugging Face folder with config.json"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelFolderError(f"{path}: not readable as JSON ({error}); copy the model folder again") from None
    if not isinstance(loaded, dict):
        raise ModelFolderError(f"{path}: holds a {type(loaded).__name__}, not an object; copy the model folder again")
    raw: dict[str, Any] = loaded
    architectures = raw.get("architectures")
    if architectures != ["LlamaForCausalLM"]:
        raise ModelFolderError(f"{path}: architectures is {architectures!r}; only ['LlamaForCausalLM'] is supported")
    for name, allowed in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if raw.get(name, allowed) != allowed:
            raise ModelFolderError(f"{path}: {name} is {raw[name]!r}; only {allowed!r} is supported")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ModelFolderError(f"{path}: rope type is {kind!r}; only 'default' is supported")

    def count(name: str, default: int | None = None) -> int:
        value = int(raw[name] if default is None else raw.get(name) or default)
        if value < 1:
            raise ValueError(f"{name} is {value}")
        return value

    try:
        heads, hidden = count("num_attention_heads"), count("hidden_size")
        kv_heads, head_size = count("num_key_value_heads", heads), count("head_dim", hidden // heads)
        if heads % kv_heads:
            raise ValueError(f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
        if head_size % 2:
            raise ValueError(f"head_dim is {head_size}, which is odd")
        eos = raw.get("eos_token_id")
        return ModelConfig(
            vocab_size=count("vocab_size"),
            hidden=hidden,
            layers=count("num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            head_size=head_size,
            intermediate=count("intermediate_size"),
            rms_eps=float(raw["rms_norm_eps"]),
            rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
            max_positions=count("max_position_embeddings"),
            tied=bool(raw.get("tie_word_embeddings", False)),
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
        )
    except KeyError as error:
        raise ModelFolderError(f"{path}: field {error.args[0]!r} is missing; copy the model folder again") from None
    except (TypeError, ValueError) as error:
        raise ModelFolderError(f"{path}: a field has no usable value ({error})") from None
