"""Adapters go to PEFT and come from PEFT with the same logits; all but plain LoRA adapters are refused, by name."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from coserve_engine.artifacts import read_peft_config, read_peft_weights
from coserve_engine.config import LINEARS
from coserve_engine.lora import LoraWeights
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
from coserve_engine.plan import Kind, Segment

VERSION = AdapterVersion("a", 1)
Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def peft_logits(path: str, folder: Path, tokens: tuple[int, ...]) -> torch.Tensor:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(path), folder)
        return model(torch.tensor([tokens])).logits[0]


def engine_logits(r: Any, folder: Path, tokens: tuple[int, ...]) -> torch.Tensor:
    """Logits at the last position, with the adapter read from `folder` as LoadAdapter reads it."""
    layout = r.executor.layout(read_peft_config(folder, 64))
    flat = read_peft_weights(folder, layout, torch.float32)
    slot = r.add(tokens)
    r.sequences[slot] = type(r.sequences[slot])(tokens, r.sequences[slot].pages, LoraWeights.served(layout, flat))
    return r.forward(Segment(Kind.PREFILL, slot, 0, len(tokens), sample=True))[slot]


@pytest.fixture(scope="module")
def make_folder(plain: str, peft_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """PEFT's own save_pretrained of a random adapter."""

    def make(**settings: Any) -> Path:
        config = LoraConfig(**{"r": 6, "lora_alpha": 12, "target_modules": list(LINEARS), **settings})
        torch.manual_seed(3)
        model = peft_model(LlamaForCausalLM.from_pretrained(plain), config)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "lora_B" in name:
                    value.normal_(std=0.1)
        folder = tmp_path_factory.mktemp("peft")
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def good(make_folder: Any) -> Path:
    return make_folder()


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "copy"))


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"target_modules": ["v_proj", "q_proj"], "r": 4}, {"r": 16, "lora_alpha": 1}],
    ids=["all", "rslora", "two", "rank16"],
)
def test_pefts_folder_gives_pefts_logits(
    rig: Any, plain: str, draw_tokens: Any, make_folder: Any, settings: dict[str, Any]
) -> None:
    made, tokens = make_folder(**settings), draw_tokens(1, 70)
    found, expected = engine_logits(rig(), made, tokens), peft_logits(plain, made, tokens)[-1]
    assert (found - expected).abs().max() < 1e-4
    r = rig()
    without = r.rows(r.add(tokens), [70])[69]
    assert (found - without).abs().max() > 1e-2, "the adapter did nothing"


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
    assert (engine_logits(rig(), path, tokens) - expected[-1]).abs().max() < 1e-4
    r = rig()
    assert (r.rows(r.add(tokens), [70])[69] - expected[-1]).abs().max() > 1e-2, "the job changed nothing"
    layout = r.executor.layout(read_peft_config(path, 64))
    flat = read_peft_weights(path, layout, torch.float32)
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


def refusal(d: Any, folder: Path) -> str:
    d.submit(LoadAdapter(VERSION, str(folder)))
    failed = d.run().one(AdapterFailed)
    assert failed.version == VERSION
    d.submit(AddRequest("r", (5, 6), SamplingParams(1), 0.0, VERSION))
    assert d.run().one(RequestFailed).code == "unknown_adapter"
    return str(failed.message)


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "use_dora"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"bias": "all"}, "bias"),
    ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
    ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
    ({"peft_type": "IA3"}, "IA3"),
    ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
    ({"target_modules": []}, "target_modules"),
    ({"target_modules": "all-linear"}, "all-linear"),
    ({"target_modules": [["q_proj"]]}, "target_modules"),
    ({"target_modules": None}, "target_modules"),
    ({"r": 65}, "65"),
    ({"r": 0}, "r is 0"),
    ({"r": "many"}, "many"),
    ({"r": float("inf")}, "r is inf"),
    ({"r": 6.5}, "r is 6.5"),
    ({"r": True}, "r is True"),
    ({"lora_alpha": None}, "lora_alpha is None"),
    ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    ({"lora_alpha": float("-inf")}, "lora_alpha is -inf"),
    ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
    ({"layers_to_transform": [0]}, "layers_to_transform"),
    ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
    ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
]


@pytest.mark.parametrize(("change", "named"), CONFIGS, ids=[str(change)[:60] for change, _ in CONFIGS])
def test_a_configuration_that_is_refused(driver: Any, folder: Path, change: dict[str, Any], named: str) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    message = refusal(driver(), folder)
    assert str(path) in message
    assert named in message


@pytest.mark.parametrize("text", ("{", "[]", "null", "\x00\xff"))
def test_a_configuration_that_is_no_configuration(driver: Any, folder: Path, text: str) -> None:
    (folder / "adapter_config.json").write_text(text, encoding="latin-1")
    assert str(folder / "adapter_config.json") in refusal(driver(), folder)


@pytest.mark.parametrize("field", ("r", "lora_alpha", "target_modules"))
def test_a_missing_field(driver: Any, folder: Path, field: str) -> None:
    path = folder / "adapter_config.json"
    facts = json.loads(path.read_text())
    del facts[field]
    path.write_text(json.dumps(facts))
    message = refusal(driver(), folder)
    assert str(path) in message
    assert repr(field) in message


@pytest.mark.parametrize("name", ("adapter_config.json", "adapter_model.safetensors"))
def test_a_missing_file(driver: Any, folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert str(folder / name) in refusal(driver(), folder)


def change_tensors(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(Q0), f"{Q0}' is missing"),
        (lambda t: t.update({Q0: t[Q0][:, :-1].contiguous()}), "(6, 63)"),
        (lambda t: t.update({Q0: t[Q0][:4].contiguous()}), "(4, 64)"),
        (lambda t: t[Q0].fill_(float("nan")), "not finite"),
        (lambda t: t[Q0][0, 0].fill_(float("inf")), "not finite"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra"),
    ],
    ids=["missing", "width", "rank", "nan", "inf", "extra"],
)
def test_weights_that_are_refused(driver: Any, folder: Path, change: Any, named: str) -> None:
    change_tensors(folder, change)
    message = refusal(driver(), folder)
    assert str(folder / "adapter_model.safetensors") in message
    assert named in message


def test_an_adapter_of_another_model(driver: Any, model_path: Any, peft_model: Any, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"])
    peft_model(LlamaForCausalLM.from_pretrained(model_path("wide")), config).save_pretrained(tmp_path)
    message = refusal(driver(), tmp_path)
    assert str(tmp_path) in message
    assert "q_proj.lora_B" in message


def test_truncated_weights(driver: Any, folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert str(path) in refusal(driver(), folder)


def test_a_rank_above_the_endpoints(driver: Any, folder: Path) -> None:
    message = refusal(driver(max_rank=4), folder)
    assert "r is 6" in message
    assert "1 to 4" in message


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
