"""config.json means to the engine what it means to transformers, in all its forms and with fields left out; what the
engine cannot do it refuses, naming file, field, value and remedy.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from coserve_engine.config import ModelConfig, Rope
from coserve_engine.errors import ModelFolderError
from coserve_engine.formats.model_folder import read_model_config
from coserve_engine.model.rope import frequencies

NAMES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
REQUIRED: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-05,
    "max_position_embeddings": 256,
}
SCALINGS: tuple[dict[str, Any], ...] = (
    {},
    {"rope_type": "default"},
    {"type": "linear", "factor": 2.5},
    {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0},
    {"type": "yarn", "factor": 4.0, "beta_fast": 16, "beta_slow": 2, "truncate": False},
    {"rope_type": "yarn", "factor": 40, "mscale": 0.7, "mscale_all_dim": 0.9},
    {"rope_type": "yarn", "factor": 0.5, "attention_factor": 0.8},
)


def write(folder: Path, kind: str, **fields: Any) -> Path:
    """config.json of one kind; ... leaves a field out."""
    facts = {"architectures": [NAMES[kind]], "model_type": kind, **REQUIRED, **fields}
    (folder / "config.json").write_text(json.dumps({name: v for name, v in facts.items() if v is not ...}))
    return folder


def maybe(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """One of `values`, or the field is left out."""
    return st.just(...) | values


@st.composite
def rope_fields(draw: st.DrawFn) -> dict[str, Any]:
    """Rotary embedding as files have described it over the years."""
    scaling = dict(draw(st.sampled_from(SCALINGS)))
    if scaling.get("rope_type", scaling.get("type")) in ("llama3", "yarn") and draw(st.booleans()):
        scaling["original_max_position_embeddings"] = draw(st.integers(8, 255))
    inside = draw(st.booleans())
    theta = draw(maybe(st.sampled_from((500, 1e4, 1e6))))
    if inside and scaling and theta is not ...:
        scaling["rope_theta"] = theta
    name = draw(st.sampled_from(("rope_scaling", "rope_parameters")))
    return {
        name: scaling or draw(st.sampled_from((..., None))),
        "rope_theta": ... if inside else theta,
        "original_max_position_embeddings": draw(maybe(st.integers(8, 255))),
        "partial_rotary_factor": draw(maybe(st.just(1.0))),
    }


@st.composite
def config_fields(draw: st.DrawFn, kind: str) -> dict[str, Any]:
    fields = {
        **draw(rope_fields()),
        "num_key_value_heads": draw(maybe(st.sampled_from((1, 8)))),
        "head_dim": draw(maybe(st.sampled_from((2, 6, 16)))),
        "tie_word_embeddings": draw(maybe(st.booleans())),
        "eos_token_id": draw(maybe(st.none() | st.integers(0, 9) | st.lists(st.integers(0, 9), min_size=1))),
    }
    if kind in ("llama", "qwen3"):
        fields["attention_bias"] = draw(maybe(st.booleans()))
    if kind == "llama":
        fields |= {
            "mlp_bias": draw(maybe(st.booleans())),
            "num_key_value_heads": draw(maybe(st.sampled_from((None, 4)))),
        }
    if kind == "mistral":
        fields["sliding_window"] = draw(maybe(st.none() | st.integers(1, 300)))
    if kind.startswith("qwen"):
        sliding = draw(maybe(st.booleans()))
        window = draw(maybe(st.none() | st.integers(1, 300)))
        fields |= {"use_sliding_window": sliding, "sliding_window": window}
        fields["max_window_layers"] = draw(maybe(st.integers(0, 5)))
        if draw(st.booleans()):
            kinds = ["full_attention"] + ["sliding_attention"] * (sliding is True and window is not None)
            fields["layer_types"] = [draw(st.sampled_from(kinds)) for _ in range(4)]
    return fields


def windows(hf: Any) -> tuple[int | None, ...]:
    """As the attention of transformers' models takes them."""
    if hf.model_type == "llama":
        return (None,) * hf.num_hidden_layers
    if hf.model_type == "mistral":
        return (hf.sliding_window,) * hf.num_hidden_layers
    return tuple(hf.sliding_window if kind == "sliding_attention" else None for kind in hf.layer_types)


def head_size(hf: Any) -> int:
    return getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads


def assert_same_rope(ours: ModelConfig, hf: Any) -> None:
    expected = LlamaRotaryEmbedding(hf)
    frequency, factor = frequencies(ours.rope, ours.head_size)
    assert torch.equal(frequency, expected.inv_freq)
    assert factor == expected.attention_scaling


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.filterwarnings("ignore")
def test_fields_mean_what_they_mean_to_transformers(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    folder = write(tmp_path, kind, **data.draw(config_fields(kind)))
    ours, hf = read_model_config(folder), AutoConfig.from_pretrained(folder)
    assert (ours.heads, ours.kv_heads, ours.head_size) == (32, hf.num_key_value_heads, head_size(hf))
    assert ours.windows == windows(hf)
    assert ours.tied == hf.tie_word_embeddings
    eos = hf.eos_token_id
    assert ours.eos_token_ids == (() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,))
    assert ours.qk_norm == (kind == "qwen3")
    attention = ("q_proj", "k_proj", "v_proj") if kind == "qwen2" else ()
    if kind in ("llama", "qwen3") and hf.attention_bias:
        attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    mlp = ("gate_proj", "up_proj", "down_proj") if getattr(hf, "mlp_bias", False) else ()
    assert ours.biased == (*attention, *mlp)
    assert_same_rope(ours, hf)


@pytest.mark.parametrize("scaling", [s for s in SCALINGS if s.get("factor")], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_the_comparison_of_rotary_embeddings_sees_the_scaling(tmp_path: Path, scaling: dict[str, Any]) -> None:
    folder = write(tmp_path, "llama", rope_scaling=scaling, head_dim=16, original_max_position_embeddings=32)
    ours, hf = read_model_config(folder), AutoConfig.from_pretrained(folder)
    assert_same_rope(ours, hf)
    plain, _ = frequencies(Rope(ours.rope.theta), ours.head_size)
    assert not torch.equal(plain, LlamaRotaryEmbedding(hf).inv_freq)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SLIDING = ["sliding_attention"] * 4


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("llama", {"model_type": "mistral"}, ["model_type is 'mistral'", "'llama'"]),
        ("llama", {"hidden_act": "gelu"}, ["hidden_act is 'gelu'", "'silu'"]),
        ("llama", {"quantization_config": {"bits": 4}}, ["quantization_config", "unquantized"]),
        ("llama", {"attention_bias": "no"}, ["attention_bias is 'no'", "true or false"]),
        ("llama", {"sliding_window": 8}, ["sliding_window is 8", "None"]),
        ("llama", {"layer_types": SLIDING}, ["layer_types", "full_attention in all 4"]),
        ("llama", {"num_key_value_heads": 5}, ["num_key_value_heads is 5", "32"]),
        ("llama", {"head_dim": 15}, ["head_dim is 15", "even"]),
        ("llama", {"hidden_size": 31}, ["head_dim is 0"]),
        ("llama", {"eos_token_id": "</s>"}, ["eos_token_id is '</s>'", "token id"]),
        ("llama", {"eos_token_id": [1, None]}, ["eos_token_id", "token id"]),
        ("llama", {"eos_token_id": 128}, ["eos_token_id is 128", "0 to 127", "same model"]),
        ("llama", {"eos_token_id": [1, -1]}, ["eos_token_id is [1, -1]", "0 to 127"]),
        ("llama", {"vocab_size": 2, "eos_token_id": ...}, ["eos_token_id is 2", "0 to 1"]),
        ("llama", {"rms_norm_eps": 10**400}, ["rms_norm_eps is 1000", "finite number"]),
        ("llama", {"rope_theta": float("inf")}, ["rope_theta is inf", "finite number"]),
        ("llama", {"num_hidden_layers": 10**400}, ["num_hidden_layers is 1000", "at most"]),
        ("llama", {"rms_norm_eps": 0}, ["rms_norm_eps is 0", "above 0"]),
        ("llama", {"vocab_size": True}, ["vocab_size is True", "whole number"]),
        ("llama", {"vocab_size": 128.0}, ["vocab_size is 128.0", "whole number"]),
        ("llama", {"rope_theta": None}, ["rope_theta is None", "finite number"]),
        ("llama", {"rope_parameters": [1]}, ["rope_parameters is [1]", "object"]),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, ["full_attention", "all layers"]),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ["rope_scaling.rope_type is 'dynamic'"]),
        ("llama", {"rope_scaling": {"rope_type": "longrope"}}, ["rope_scaling.rope_type is 'longrope'", "yarn"]),
        ("llama", {"rope_scaling": {"type": "linear"}}, ["'rope_scaling.factor' is missing"]),
        ("llama", {"rope_scaling": {"type": "linear", "factor": -1}}, ["rope_scaling.factor is -1", "above 0"]),
        ("llama", {"rope_scaling": {"type": "linear", "factor": float("nan")}}, ["factor is nan", "finite"]),
        ("llama", {"rope_scaling": {"type": "linear", "factor": "2"}}, ["factor is '2'", "number"]),
        ("llama", {"rope_parameters": {**LLAMA3, "high_freq_factor": 0.5}}, ["high_freq_factor is 0.5", "1.0"]),
        ("llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 0}}, ["embeddings is 0"]),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, ["'rope_parameters.factor' is missing"]),
        ("llama", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor is 0.5", "1.0"]),
        (
            "llama",
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            ["rope_parameters.partial_rotary_factor is 0.5"],
        ),
        ("mistral", {"sliding_window": 0}, ["sliding_window is 0", "at least 1"]),
        ("mistral", {"sliding_window": None, "layer_types": SLIDING}, ["layer_types", "full_attention in all 4"]),
        ("qwen2", {"use_sliding_window": 1}, ["use_sliding_window is 1", "true or false"]),
        ("qwen2", {"layer_types": SLIDING}, ["layer_types", "use_sliding_window"]),
        ("qwen2", {"use_sliding_window": True, "layer_types": SLIDING[1:]}, ["layer_types", "list of 4"]),
        ("qwen2", {"layer_types": ["linear_attention"] * 4}, ["layer_types", "linear_attention"]),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": -1}, ["max_window_layers is -1", "at least 0"]),
    ],
    ids=lambda value: str(value)[:80],
)
def test_what_the_engine_cannot_do(tmp_path: Path, kind: str, fields: dict[str, Any], said: list[str]) -> None:
    read_model_config(write(tmp_path, kind))
    with pytest.raises(ModelFolderError) as caught:
        read_model_config(write(tmp_path, kind, **fields))
    assert all(part in str(caught.value) for part in (str(tmp_path / "config.json"), *said)), caught.value
