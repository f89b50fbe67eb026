"""A model folder that is missing, broken or of another kind is refused; the message names the file and the thing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from coserve_engine.config import EngineConfig
from coserve_engine.errors import ModelFolderError
from coserve_engine.formats.model_folder import read_model_config
from coserve_engine.model.executor import Executor

Q0 = "model.layers.0.self_attn.q_proj.weight"
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(plain: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "model"))


def refusal(folder: Path, **settings: Any) -> str:
    with pytest.raises(ModelFolderError) as caught:
        Executor(EngineConfig(str(folder), **{"max_model_length": 256, **settings}))
    return str(caught.value)


def test_the_copy_is_accepted(folder: Path) -> None:
    Executor(EngineConfig(str(folder), max_model_length=256))


def test_no_folder(tmp_path: Path) -> None:
    assert str(tmp_path / "none" / "config.json") in refusal(tmp_path / "none")


@pytest.mark.parametrize("text", ("", "{", "[]", "null", "3", "\xff\xfe"))
def test_a_configuration_that_is_no_json_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="latin-1")
    assert str(folder / "config.json") in refusal(folder)


REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "rms_norm_eps",
    "max_position_embeddings",
)


def change(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    facts = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in facts.items() if value is not ...}))


@pytest.mark.parametrize("field", REQUIRED)
def test_a_missing_field(folder: Path, field: str) -> None:
    change(folder, **{field: ...})
    message = refusal(folder)
    assert str(folder / "config.json") in message
    assert repr(field) in message


@pytest.mark.parametrize("value", ("many", None, [1]))
@pytest.mark.parametrize("field", REQUIRED)
def test_a_field_that_is_no_number(folder: Path, field: str, value: Any) -> None:
    change(folder, **{field: value})
    assert str(folder / "config.json") in refusal(folder)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM"),
        ({"architectures": ...}, "None"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"architectures": ["MistralForCausalLM"]}, "model_type"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
    ],
    ids=str,
)
def test_a_model_that_is_not_supported(folder: Path, fields: dict[str, Any], named: str) -> None:
    change(folder, **fields)
    message = refusal(folder)
    assert str(folder / "config.json") in message
    assert named in message


def test_a_context_longer_than_the_models(folder: Path) -> None:
    message = refusal(folder, max_model_length=513)
    assert "513" in message
    assert "512" in message


def test_a_pool_smaller_than_a_sequence(folder: Path) -> None:
    assert "kvCacheMemory" in refusal(folder, kv_cache_bytes=8192 * 16)


# ---- weights ----


def change_tensors(folder: Path, change_them: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change_them(tensors)
    save_file(tensors, folder / WEIGHTS)


def test_no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert str(folder / WEIGHTS) in refusal(folder)


def test_weights_that_are_links_into_a_cache(folder: Path) -> None:
    """As a Hub download's snapshot has them, where the claim holds the snapshot alone."""
    (folder / WEIGHTS).rename(folder.parent / "blob")
    (folder / WEIGHTS).symlink_to("../blob")
    Executor(EngineConfig(str(folder), max_model_length=256))
    (folder.parent / "blob").unlink()
    message = refusal(folder)
    assert f"{folder / WEIGHTS}: no such file; it is a link to ../blob" in message
    assert "cp -rL" in message


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("pytorch_model.bin", "pytorch_model.bin is no safetensors: save the model with transformers' save_pretrained"),
        ("model-00001-of-00002.safetensors", "00002.safetensors is there: copy the rest of the folder, model.safe"),
        ("model.safetensors.incomplete", "copy the model folder again"),
    ],
)
def test_weights_of_another_name(folder: Path, name: str, remedy: str) -> None:
    """Of another format, without the index of their shards, or of a download that was interrupted."""
    (folder / WEIGHTS).rename(folder / name)
    message = refusal(folder)
    assert f"{folder / WEIGHTS}: no such file; " in message
    assert remedy in message


def test_a_shard_that_is_not_there(folder: Path) -> None:
    """Nothing is loaded before all of the index is there."""
    index = {"weight_map": {"a": WEIGHTS, "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"{folder / 'model-00002-of-00002.safetensors'}: no such file" in refusal(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": f"../none/{WEIGHTS}"}}))
    assert f"{folder}/../none/{WEIGHTS}: no such file" in refusal(folder)


@pytest.mark.parametrize("left", (0, 4, 100, -8))
def test_truncated_weights(folder: Path, left: int) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:left])
    message = refusal(folder)
    assert str(folder / WEIGHTS) in message
    assert "truncated" in message


@pytest.mark.parametrize("name", (Q0, "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"))
def test_a_missing_tensor(folder: Path, name: str) -> None:
    change_tensors(folder, lambda tensors: tensors.pop(name))
    message = refusal(folder)
    assert str(folder) in message
    assert repr(name) in message
    assert ("tie_word_embeddings" in message) == (name == "lm_head.weight")


def test_a_tensor_of_another_shape(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({Q0: torch.zeros(64, 32)}))
    message = refusal(folder)
    assert str(folder / WEIGHTS) in message
    assert repr(Q0) in message
    assert "(64, 32)" in message
    assert "(64, 64)" in message


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("name", (Q0, "lm_head.weight", "model.norm.weight"))
def test_a_value_that_is_not_finite(folder: Path, name: str, value: float) -> None:
    change_tensors(folder, lambda tensors: tensors[name].view(-1)[-1].fill_(value))
    message = refusal(folder)
    assert str(folder / WEIGHTS) in message
    assert repr(name) in message
    assert "not finite" in message


def test_a_value_too_large_for_the_engines_type(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({Q0: torch.full((64, 64), 1e300, dtype=torch.float64)}))
    assert "not finite as float32" in refusal(folder)
    Executor(EngineConfig(str(folder), max_model_length=256, dtype="float64"))


def test_a_value_that_bfloat16_rounds_to_infinity(folder: Path) -> None:
    """The file is right, and float32 holds it."""
    change_tensors(folder, lambda tensors: tensors.update({Q0: torch.full((64, 64), 3.4e38)}))
    assert "not finite as bfloat16; set engine.dtype to float32" in refusal(folder, dtype="bfloat16")
    Executor(EngineConfig(str(folder), max_model_length=256))


@pytest.mark.parametrize(
    "name",
    (
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.mlp.up_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.2.self_attn.q_proj.weight",
        "score.weight",
    ),
)
def test_a_tensor_without_a_place(folder: Path, name: str) -> None:
    """It would change what the model computes, had config.json not left it out."""
    change_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(64)}))
    message = refusal(folder)
    assert str(folder / WEIGHTS) in message
    assert repr(name) in message
    assert "copy config.json and weights from the same model" in message


def test_old_tables_of_rotary_embedding_are_ignored(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(8)}))
    Executor(EngineConfig(str(folder), max_model_length=256))


@pytest.mark.parametrize("dtype", (torch.int8, torch.float8_e4m3fn))
def test_a_quantized_tensor(folder: Path, dtype: torch.dtype) -> None:
    change_tensors(folder, lambda tensors: tensors.update({Q0: torch.zeros(64, 64, dtype=dtype)}))
    message = refusal(folder)
    assert str(folder / WEIGHTS) in message
    assert repr(Q0) in message
    assert "unquantized" in message


def test_a_missing_bias(model_path: Callable[[str], str], tmp_path: Path) -> None:
    folder, name = (
        Path(shutil.copytree(model_path("qwen2"), tmp_path / "model")),
        "model.layers.1.self_attn.k_proj.bias",
    )
    change_tensors(folder, lambda tensors: tensors.pop(name))
    assert repr(name) in refusal(folder)


def test_a_head_beside_a_tied_embedding(model_path: Callable[[str], str], tmp_path: Path) -> None:
    """A copy of it is harmless; one of its own says that the model is not tied."""
    folder = Path(shutil.copytree(model_path("tied"), tmp_path / "model"))
    embedding = load_file(folder / WEIGHTS)["model.embed_tokens.weight"]
    change_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    assert torch.equal(Executor(EngineConfig(str(folder), max_model_length=256)).transformer.weights.embed, embedding)
    change_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": 2 * embedding}))
    message = refusal(folder)
    assert "'lm_head.weight'" in message
    assert "tie_word_embeddings" in message


def test_weights_do_not_change_with_their_file(folder: Path) -> None:
    """The tensors of a file that is mapped into memory would."""
    weights = Executor(EngineConfig(str(folder), max_model_length=256)).transformer.weights
    before = weights.embed.clone()
    size = (folder / WEIGHTS).stat().st_size
    with (folder / WEIGHTS).open("r+b") as file:
        file.seek(1 << 14)
        file.write(bytes(size - (1 << 14)))
    assert torch.equal(weights.embed, before)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
def test_weights_of_other_types(folder: Path, dtype: torch.dtype) -> None:
    change_tensors(folder, lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items()}))
    embed = Executor(EngineConfig(str(folder), max_model_length=256)).transformer.weights.embed
    assert embed.dtype is torch.float32
    assert torch.equal(embed, load_file(folder / WEIGHTS)["model.embed_tokens.weight"].float())


# ---- shards ----


@pytest.fixture
def sharded(plain: str, tmp_path: Path) -> Path:
    LlamaForCausalLM.from_pretrained(plain).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    folder = tmp_path / "sharded"
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def test_shards_are_the_same_model(sharded: Path, plain: str) -> None:
    config = read_model_config(sharded)
    one, many = (Executor(EngineConfig(str(f), max_model_length=256)).transformer.weights for f in (plain, sharded))
    assert len(many.layers) == config.layers
    x = {n: torch.randn(8, n) for n in (config.hidden, config.intermediate)}
    assert torch.equal(one.head.forward(x[config.hidden]), many.head.forward(x[config.hidden]))
    for a, b in zip(one.layers, many.layers, strict=True):
        for name in a.linears:
            rows = x[config.linear_shape(name)[1]]
            assert torch.equal(a.linears[name].forward(rows), b.linears[name].forward(rows))


def test_a_missing_shard(sharded: Path) -> None:
    lost = sorted(sharded.glob("model-*.safetensors"))[1]
    lost.unlink()
    assert str(lost) in refusal(sharded)


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    name, value = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: value}, second)
    message = refusal(sharded)
    assert str(second) in message
    assert repr(name) in message


@pytest.mark.parametrize("text", ("{", "{}", "[]", '{"weight_map": 3}'))
def test_a_broken_index(sharded: Path, text: str) -> None:
    index = sharded / "model.safetensors.index.json"
    index.write_text(text)
    assert str(index) in refusal(sharded)


def test_an_index_that_names_no_file(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}')
    assert str(sharded / "3") in refusal(sharded)


def test_an_index_that_leaves_the_folder(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {Q0: "../model.safetensors"}}))
    assert "../model.safetensors" in refusal(sharded)
