"""Adapters go to PEFT and come from PEFT with the same logits, whatever chose the linears that they adapt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft_folders import TOLERANCE, engine_logits, peft_logits, save_adapter
from safetensors.torch import load_file, save_file

from coserve_engine.config import LINEARS
from coserve_engine.formats import adapter_config
from coserve_engine.formats.adapter_folder import read_adapter
from coserve_engine.messages import (
    AdapterExported,
    AdapterFailed,
    AdapterLoaded,
    AdapterVersion,
    AddRequest,
    ExportAdapter,
    LoadAdapter,
    LoraSpec,
    RequestFailed,
    SamplingParams,
    UnloadAdapter,
)

VERSION = AdapterVersion("a", 1)
QKV = ["q_proj", "k_proj", "v_proj"]

PLAIN_LORA: dict[str, dict[str, Any]] = {
    "all": {},
    "rslora": {"use_rslora": True},
    "two": {"target_modules": ["v_proj", "q_proj"], "r": 4},
    "rank16": {"r": 16, "lora_alpha": 1},
    "alpha_below_zero": {"lora_alpha": -7},
    "dropout": {"lora_dropout": 0.3},
    "regex": {"target_modules": r".*\.(q|down)_proj"},
    "regex_of_a_layer": {"target_modules": r"model\.layers\.1\.mlp\..*_proj"},
    "full_names": {"target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]},
    "dotted_names": {"target_modules": ["self_attn.o_proj", "mlp.up_proj"]},
    "all_linear": {"target_modules": "all-linear"},
    "null": {"target_modules": None},
    "a_layer": {"layers_to_transform": 0},
    "a_list_of_layers": {"layers_to_transform": [1], "target_modules": QKV},
    "a_layer_by_pattern": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "excluded": {"exclude_modules": ["down_proj", "model.layers.1.self_attn.q_proj"]},
    "excluded_by_regex": {"target_modules": "all-linear", "exclude_modules": r".*layers\.0\..*"},
    "patterns_repeat": {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {r"layers\.\d+\.mlp.*": 12}},
    "patterns_of_nothing": {"rank_pattern": {"lm_head": 3, "q_pro": 2}, "alpha_pattern": {"proj": 1}},
    "ranks": {"rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.(up|down)_proj": 17}},
    "alphas": {"alpha_pattern": {"model.layers.0.self_attn.k_proj": 40, "down_proj": 0.5}},
    "ranks_and_alphas": {
        "rank_pattern": {r"layers\.1\..*": 1, "self_attn.v_proj": 8, "v_proj": 5},
        "alpha_pattern": {r"layers\.1\..*": 3, "^model.layers.0.mlp.up_proj": 2, "model.layers.1.self_attn.q_proj": 90},
    },
    "ranks_and_alphas_rslora": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 20, "mlp.up_proj": 2},
        "alpha_pattern": {"q_proj": 3},
    },
    "r_that_no_linear_has": {"r": 128, "rank_pattern": {".*_proj": 4}, "alpha_pattern": {".*": 8}},
    "gaussian": {"init_lora_weights": "Gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "eva": {"init_lora_weights": "eva", "rank_pattern": {"q_proj": 9}},
    "mica": {"init_lora_weights": "mica"},
    "random_start": {"init_lora_weights": False},
    "notes": {"revision": "main", "qalora_group_size": 4, "megatron_core": "x", "ensure_weight_tying": True},
}


@pytest.mark.parametrize("settings", PLAIN_LORA.values(), ids=PLAIN_LORA)
def test_pefts_folder_gives_pefts_logits(
    rig: Any, plain: str, draw_tokens: Any, tmp_path: Path, settings: dict[str, Any]
) -> None:
    made, tokens = save_adapter(plain, tmp_path, **settings), draw_tokens(1, 70)
    found, expected = engine_logits(rig(), made, tokens), peft_logits(plain, made, tokens)[-1]
    assert (found - expected).abs().max() < TOLERANCE
    r = rig()
    without = r.rows(r.add(tokens), [70])[69]
    assert (found - without).abs().max() > 1e-2, "the adapter did nothing"


@pytest.mark.parametrize("name", ("alphas", "ranks_and_alphas", "ranks_and_alphas_rslora"))
def test_pefts_logits_are_missed_where_patterns_are_read_in_another_way(
    rig: Any, plain: str, draw_tokens: Any, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: patterns that say nothing of alpha."""
    made, tokens = save_adapter(plain, tmp_path, **PLAIN_LORA[name]), draw_tokens(1, 70)
    scale_of = adapter_config.AdapterConfig.scale_of
    monkeypatch.setattr(
        adapter_config.AdapterConfig, "scale_of", lambda self, module: scale_of(replace(self, alpha_pattern={}), module)
    )
    found, expected = engine_logits(rig(), made, tokens), peft_logits(plain, made, tokens)[-1]
    assert (found - expected).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("model", ("llama31", "mistral", "qwen2", "qwen3"))
def test_pefts_folders_of_other_architectures(
    rig: Any, model_path: Any, draw_tokens: Any, tmp_path: Path, model: str
) -> None:
    path, tokens = model_path(model), draw_tokens(1, 70)
    made = save_adapter(path, tmp_path, target_modules="all-linear", rank_pattern={"k_proj": 2})
    found, expected = engine_logits(rig(path), made, tokens), peft_logits(path, made, tokens)[-1]
    assert (found - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
def test_factors_of_another_precision(rig: Any, plain: str, draw_tokens: Any, folder: Path, dtype: torch.dtype) -> None:
    path, tokens = folder / "adapter_model.safetensors", draw_tokens(1, 70)
    save_file({name: value.to(dtype) for name, value in load_file(path).items()}, path)
    found, expected = engine_logits(rig(), folder, tokens), peft_logits(plain, folder, tokens)[-1]
    assert (found - expected).abs().max() < TOLERANCE


def test_linears_without_tensors_add_nothing(rig: Any, plain: str, draw_tokens: Any, folder: Path) -> None:
    """As in PEFT, whatever target_modules says."""
    path, tokens = folder / "adapter_model.safetensors", draw_tokens(1, 70)
    save_file({name: value for name, value in load_file(path).items() if ".1." in name and "v_proj" not in name}, path)
    found, expected = engine_logits(rig(), folder, tokens), peft_logits(plain, folder, tokens)[-1]
    assert (found - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32, torch.float64))
def test_bfloat16_rounds_factors_once(rig: Any, draw_tokens: Any, folder: Path, dtype: torch.dtype) -> None:
    """Whatever precision they were saved in; a fp16 or fp32 adapter on a base in bfloat16 is the usual case."""
    path, tokens = folder / "adapter_model.safetensors", draw_tokens(1, 70)
    saved = {name: value.to(dtype) for name, value in load_file(path).items()}
    save_file(saved, path)
    found = engine_logits(rig(dtype="bfloat16"), folder, tokens)
    save_file({name: value.bfloat16() for name, value in saved.items()}, path)
    assert torch.equal(found, engine_logits(rig(dtype="bfloat16"), folder, tokens))


@pytest.mark.parametrize("absent", (("k_proj",), ("q_proj", "v_proj"), ("gate_proj",)))
def test_a_part_of_a_fused_product_without_tensors_adds_nothing(
    rig: Any, plain: str, draw_tokens: Any, tmp_path: Path, absent: tuple[str, ...]
) -> None:
    """Queries, keys and values are one product there, gate and up another."""
    made, tokens = save_adapter(plain, tmp_path, target_modules="all-linear"), draw_tokens(1, 70)
    path = made / "adapter_model.safetensors"
    tensors = load_file(path)
    rest = {name: value for name, value in tensors.items() if not any(linear in name for linear in absent)}
    zeros = {name: torch.zeros_like(value) for name, value in tensors.items() if "lora_B" in name and name not in rest}
    whole = engine_logits(rig(dtype="bfloat16"), made, tokens)
    save_file(tensors | zeros, path)
    expected = engine_logits(rig(dtype="bfloat16"), made, tokens)
    save_file(rest, path)
    assert torch.equal(engine_logits(rig(dtype="bfloat16"), made, tokens), expected)
    assert not torch.equal(whole, expected), "what is absent did something"


def test_adapters_of_many_shapes_in_one_batch(driver: Any, plain: str, draw_tokens: Any, tmp_path: Path) -> None:
    """Each request's greedy tokens are those it gets from PEFT alone."""
    names = ("two", "ranks_and_alphas", "a_layer", "rslora")
    d, greedy = driver(), SamplingParams(10, ignore_eos=True)
    prompts = {name: draw_tokens(len(name), 20 + index) for index, name in enumerate(names)}
    for name in names:
        save_adapter(plain, tmp_path / name, **PLAIN_LORA[name])
        d.submit(LoadAdapter(AdapterVersion(name, 1), str(tmp_path / name)))
    d.run()
    d.submit(*(AddRequest(n, prompts[n], greedy, 0.0, AdapterVersion(n, 1)) for n in names))
    tokens = d.run().tokens()
    for name in names:
        expected = peft_logits(plain, tmp_path / name, (*prompts[name], *tokens[name])).argmax(-1).tolist()
        assert tokens[name] == expected[len(prompts[name]) - 1 : -1]


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_what_a_job_exports(
    driver: Any, rig: Any, plain: str, draw_tokens: Any, training: Any, start_job: Any, tmp_path: Path, rslora: bool
) -> None:
    d, path, tokens = driver(), tmp_path / "adapter", draw_tokens(1, 70)
    lora = LoraSpec(6, 12.0, LINEARS, dropout=0.25, use_rslora=rslora)
    start = replace(start_job(), lora=lora)
    d.submit(start, *training(steps=3), ExportAdapter("job", 99, str(path), plain))
    assert d.run().one(AdapterExported).path == str(path)
    written = LoraConfig.from_pretrained(path)
    assert (written.lora_dropout, written.use_rslora, written.r, written.lora_alpha) == (0.25, rslora, 6, 12.0)
    expected = peft_logits(plain, path, tokens)
    assert (engine_logits(rig(), path, tokens) - expected[-1]).abs().max() < TOLERANCE
    r = rig()
    assert (r.rows(r.add(tokens), [70])[69] - expected[-1]).abs().max() > 1e-2, "the job changed nothing"
    layout, exact = r.executor.layout(lora), torch.float32
    flat = layout.flat(read_adapter(path, r.executor.model, 64, exact), exact, torch.device("cpu"))
    views = [x.flatten() for layer in layout.views(flat) for pair in layer.values() for x in pair]
    assert torch.equal(torch.cat(views), d.parameters())


def test_requests_use_a_loaded_version(driver: Any, draw_tokens: Any, good: Path, plain: str) -> None:
    d, prompt = driver(), draw_tokens(2, 30)
    greedy = SamplingParams(12, ignore_eos=True)
    d.submit(AddRequest("early", prompt, greedy, 0.0, VERSION), LoadAdapter(VERSION, str(good)))
    d.run()
    assert d.one(AdapterLoaded).version == VERSION
    assert d.one(RequestFailed).code == "unknown_adapter"
    d.submit(AddRequest("with", prompt, greedy, 0.0, VERSION), AddRequest("base", prompt, greedy, 0.0))
    d.step()
    d.submit(UnloadAdapter(VERSION), AddRequest("late", prompt, greedy, 0.0, VERSION))
    tokens = d.run().tokens()
    expected = peft_logits(plain, good, (*prompt, *tokens["with"])).argmax(-1).tolist()
    assert tokens["with"] == expected[len(prompt) - 1 : -1]
    assert tokens["base"] != tokens["with"]
    assert "late" not in tokens
    assert [f.code for f in d.of(RequestFailed)] == ["unknown_adapter"] * 2


def test_unloaded_before_it_was_loaded(driver: Any, draw_tokens: Any, good: Path) -> None:
    """Whatever the files' thread does meanwhile."""
    d = driver()
    d.submit(LoadAdapter(VERSION, str(good)), UnloadAdapter(VERSION))
    assert "unloaded" in d.run().one(AdapterFailed).message
    d.submit(AddRequest("r", draw_tokens(2, 30), SamplingParams(2), 0.0, VERSION))
    assert d.run().one(RequestFailed).code == "unknown_adapter"
    d.submit(LoadAdapter(VERSION, "/nowhere"), UnloadAdapter(VERSION), LoadAdapter(VERSION, str(good)))
    d.run()
    assert len(d.of(AdapterFailed)) == 2
    assert d.one(AdapterLoaded).version == VERSION
    d.submit(AddRequest("r", draw_tokens(2, 30), SamplingParams(2, ignore_eos=True), 0.0, VERSION))
    assert len(d.run().tokens()["r"]) == 2


@pytest.mark.parametrize("steps", (0, 1))
def test_a_version_that_is_loaded_or_being_loaded(driver: Any, draw_tokens: Any, good: Path, steps: int) -> None:
    """The weights of the first load stay; a version whose load failed can be loaded again."""
    d = driver()
    d.submit(LoadAdapter(VERSION, "/nowhere"))
    assert "/nowhere" in d.run().one(AdapterFailed).message
    d.submit(LoadAdapter(VERSION, str(good)))
    if steps:
        d.run()
    d.submit(LoadAdapter(VERSION, "/elsewhere"))
    refused = d.run().of(AdapterFailed)[-1]
    assert str(VERSION) in refused.message
    assert "unload it first" in refused.message
    assert d.one(AdapterLoaded).version == VERSION
    d.submit(AddRequest("r", draw_tokens(2, 30), SamplingParams(2, ignore_eos=True), 0.0, VERSION))
    assert len(d.run().tokens()["r"]) == 2
