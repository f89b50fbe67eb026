"""An adapter that is not plain LoRA, or of another model, is refused with file, field or tensor, value and remedy."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, MontecloraConfig
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, VeloraConfig
from peft_folders import TOLERANCE, engine_logits, peft_logits, save_adapter
from safetensors.torch import load_file, save_file

from coserve_engine.errors import AdapterFolderError
from coserve_engine.formats.adapter_config import CHOSEN_BY, COMPUTED, NOTES, REFUSED
from coserve_engine.messages import (
    AdapterFailed,
    AdapterVersion,
    AddRequest,
    LoadAdapter,
    RequestFailed,
    SamplingParams,
)

VERSION = AdapterVersion("a", 1)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q2 = Q0.replace(".0.", ".2.")

OTHER_MATHEMATICS: dict[str, dict[str, Any]] = {
    "use_dora": {"use_dora": True},
    "layer_replication": {"layer_replication": [(1, 2), (0, 1)]},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "bias": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "trainable_token_indices": {"trainable_token_indices": [5, 6]},
    "use_bdlora": {"use_bdlora": BdLoraConfig(["q_proj"], ["o_proj"], nblocks=2, match_strict=False)},
    "kasa_config": {"kasa_config": KasaConfig()},
    "velora_config": {"velora_config": VeloraConfig(num_groups=8)},
    "monteclora_config": {"monteclora_config": MontecloraConfig()},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1]},
    "init_lora_weights": {"init_lora_weights": "olora"},
    "init_lora_weights_pissa": {"init_lora_weights": "pissa_niter_4"},
}
"""What PEFT saves of variants that it computes in another way, by the field that says so."""

MODELS = {"bias": "llama31", "lora_bias": "llama31"}
"""These need linears with a bias."""


def refusal(d: Any, folder: Path) -> str:
    d.submit(LoadAdapter(VERSION, str(folder)))
    failed = d.run().one(AdapterFailed)
    assert failed.version == VERSION
    d.submit(AddRequest("r", (5, 6), SamplingParams(1), 0.0, VERSION))
    assert d.run().one(RequestFailed).code == "unknown_adapter"
    return str(failed.message)


def change_config(folder: Path, **change: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def change_tensors(folder: Path, change: Any) -> None:
    path = folder / WEIGHTS
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


# ---- configurations ----


@pytest.mark.parametrize("name", OTHER_MATHEMATICS)
def test_a_variant_that_peft_saved(driver: Any, model_path: Any, tmp_path: Path, name: str) -> None:
    path = model_path(MODELS.get(name, "plain"))
    message = refusal(driver(path), save_adapter(path, tmp_path, **OTHER_MATHEMATICS[name]))
    field, *_ = OTHER_MATHEMATICS[name]
    assert f"{tmp_path / CONFIG}: {field} is " in message


@pytest.mark.parametrize("name", OTHER_MATHEMATICS)
def test_a_variant_has_other_logits_where_its_field_is_not_looked_at(
    rig: Any, model_path: Any, draw_tokens: Any, tmp_path: Path, name: str
) -> None:
    """Why it is refused: without the field its tensors have no place, or it is another adapter."""
    path, tokens = model_path(MODELS.get(name, "plain")), draw_tokens(1, 70)
    save_adapter(path, tmp_path, **OTHER_MATHEMATICS[name])
    expected = peft_logits(path, tmp_path, tokens)[-1]
    field, *_ = OTHER_MATHEMATICS[name]
    change_config(tmp_path, **{field: None})
    try:
        found = engine_logits(rig(path), tmp_path, tokens)
    except AdapterFolderError as error:
        assert WEIGHTS in str(error)
    else:
        assert (found - expected).abs().max() > 10 * TOLERANCE


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    ({"peft_type": None}, "peft_type is None"),
    ({"use_dora": "yes"}, "use_dora is 'yes'"),
    ({"bias": "all"}, "bias is 'all'"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
    ({"use_qalora": True}, "use_qalora is True"),
    ({"megatron_config": {"hidden_size": 64}}, "megatron_config is "),
    ({"target_parameters": ["mlp.experts"]}, "target_parameters is "),
    ({"arrow_config": {"top_k": 3}}, "arrow_config is "),
    ({"arrow_config": {}}, "arrow_config is {}"),
    ({"use_bdlora": {}}, "use_bdlora is {}"),
    ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens is [5]"),
    ({"trainable_token_indices": {"embed_tokens": [1]}}, "trainable_token_indices is "),
    ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
    ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda'"),
    ({"init_lora_weights": "lora_ga"}, "init_lora_weights is 'lora_ga'"),
    ({"init_lora_weights": "of next year"}, "init_lora_weights is 'of next year'"),
    ({"use_rslora": "false"}, "use_rslora is 'false'"),
    ({"of_next_year": {"beta": 0.5}}, "of_next_year is {'beta': 0.5}"),
    ({"use_next_year": True}, "use_next_year is True"),
    ({"r": 65}, "r is 65"),
    ({"r": 0}, "r is 0"),
    ({"r": "many"}, "many"),
    ({"r": float("inf")}, "r is inf"),
    ({"r": 6.5}, "r is 6.5"),
    ({"r": True}, "r is True"),
    ({"lora_alpha": None}, "lora_alpha is None"),
    ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    ({"lora_alpha": float("-inf")}, "lora_alpha is -inf"),
    ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
    ({"rank_pattern": {"q_proj": 65}}, "rank_pattern is 65 for model.layers.0.self_attn.q_proj"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj'] is 0"),
    ({"rank_pattern": {"q_proj": "8"}}, "rank_pattern['q_proj'] is '8'"),
    ({"rank_pattern": ["q_proj"]}, "rank_pattern is ['q_proj']"),
    ({"rank_pattern": {"(q_proj": 6}}, "'(q_proj'"),
    ({"rank_pattern": {"q_proj": 8}}, "q_proj.lora_A.weight' has shape (6, 64)"),
    ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern['q_proj'] is None"),
    ({"alpha_pattern": {"[": 1}}, "'['"),
    ({"alpha_pattern": {"q{99999999999999999999}": 1}}, "q{99999999999999999999}"),
    ({"alpha_pattern": 3}, "alpha_pattern is 3"),
]


@pytest.mark.parametrize(("change", "named"), CHANGES, ids=[str(change)[:60] for change, _ in CHANGES])
def test_a_configuration_that_is_refused(driver: Any, folder: Path, change: dict[str, Any], named: str) -> None:
    change_config(folder, **change)
    message = refusal(driver(), folder)
    assert str(folder) in message
    assert named in message


@pytest.mark.parametrize("value", (None, False, [], {}, "", 0))
def test_a_field_nobody_knows_that_is_empty(
    rig: Any, plain: str, draw_tokens: Any, good: Path, folder: Path, value: object
) -> None:
    tokens = draw_tokens(1, 70)
    change_config(folder, of_next_year=value, modules_to_save=[], target_parameters=None, megatron_config=value)
    assert torch.equal(engine_logits(rig(), folder, tokens), engine_logits(rig(), good, tokens))


def test_every_field_of_the_installed_peft_is_known(plain: str) -> None:
    known = {*COMPUTED, *CHOSEN_BY, *NOTES, *REFUSED}
    assert {field.name for field in dataclasses.fields(LoraConfig)} == known


@pytest.mark.parametrize(
    "text", ("{", "[]", "null", "\x00\xff", "[" * 100_000), ids=("open", "list", "null", "bytes", "deep")
)
def test_a_configuration_that_is_no_configuration(driver: Any, folder: Path, text: str) -> None:
    (folder / CONFIG).write_text(text, encoding="latin-1")
    assert str(folder / CONFIG) in refusal(driver(), folder)


@pytest.mark.parametrize("field", ("r", "lora_alpha", "peft_type"))
def test_a_missing_field(driver: Any, folder: Path, field: str) -> None:
    path = folder / CONFIG
    facts = json.loads(path.read_text())
    del facts[field]
    path.write_text(json.dumps(facts))
    message = refusal(driver(), folder)
    assert str(path) in message
    assert repr(field) in message


def test_a_rank_above_the_endpoints(driver: Any, folder: Path) -> None:
    message = refusal(driver(max_rank=4), folder)
    assert "r is 6" in message
    assert "1 to 4" in message


def test_patterns_whose_order_was_lost(driver: Any, plain: str, draw_tokens: Any, tmp_path: Path) -> None:
    """PEFT takes the first that matches and saves them sorted: it does not read the folder either."""
    save_adapter(plain, tmp_path, rank_pattern={"self_attn.v_proj": 8, r".*\.1\..*": 1})
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft_logits(plain, tmp_path, draw_tokens(1, 70))
    assert "layers.1.self_attn.v_proj.lora_A.weight' has shape (8, 64)" in refusal(driver(), tmp_path)


# ---- weights ----


@pytest.mark.parametrize("name", (CONFIG, WEIGHTS))
def test_a_missing_file(driver: Any, folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert str(folder / name) in refusal(driver(), folder)


def test_a_pickle_is_refused_with_the_command_that_converts_it(
    rig: Any, driver: Any, plain: str, draw_tokens: Any, tmp_path: Path
) -> None:
    tokens = draw_tokens(1, 70)
    save_adapter(plain, tmp_path, safe_serialization=False)
    expected = peft_logits(plain, tmp_path, tokens)[-1]
    message = refusal(driver(), tmp_path)
    assert f"{tmp_path / 'adapter_model.bin'}: a pickle" in message
    command = message[message.index("python -c") :].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert (engine_logits(rig(), tmp_path, tokens) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(Q0), f"{Q0}' is missing"),
        (lambda t: t.pop(Q0.replace("lora_A", "lora_B")), "lora_B.weight' is missing"),
        (lambda t: t.update({Q0: t[Q0][:, :-1].contiguous()}), "(6, 63)"),
        (lambda t: t.update({Q0: t[Q0][:4].contiguous()}), "(4, 64)"),
        (lambda t: t.update({Q0: t[Q0].flatten()}), "(384,)"),
        (lambda t: t.update({Q0: t[Q0].to(torch.int8)}), "torch.int8"),
        (lambda t: t[Q0].fill_(float("nan")), "not finite"),
        (lambda t: t[Q0][0, 0].fill_(float("inf")), "not finite"),
        (lambda t: t.update({Q0: torch.full((6, 64), 1e300, dtype=torch.float64)}), "not finite"),
        (lambda t: t.update(extra=torch.zeros(1)), "'extra' has no place"),
        (lambda t: t.update({Q2: t[Q0].clone()}), f"{Q2}' has no place"),
        (lambda t: t.update({Q0.replace("lora_A", "lora_A.default"): t.pop(Q0)}), "q_proj.lora_A.weight' is missing"),
        (lambda t: t.clear(), "adapts nothing"),
    ],
    ids=[
        *("missing", "missing_b", "width", "rank", "flat", "integers", "nan", "inf", "overflow", "extra", "layer"),
        *("adapter_name", "none"),
    ],
)
def test_weights_that_are_refused(driver: Any, folder: Path, change: Any, named: str) -> None:
    change_tensors(folder, change)
    message = refusal(driver(), folder)
    assert str(folder / WEIGHTS) in message
    assert named in message


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace("base_model.model.model.", "base_model.model."),
        lambda name: name.replace("base_model.model.", ""),
        lambda name: name.replace("model.layers", "model.language_model.layers"),
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    ],
    ids=["of_the_inner_model", "of_no_prefix", "of_a_vision_model", "with_the_adapters_name", "compiled"],
)
def test_names_that_peft_does_not_find(driver: Any, plain: str, draw_tokens: Any, folder: Path, rename: Any) -> None:
    """PEFT warns and adds nothing to the base model; here the first name is said, and what names are known."""
    change_tensors(folder, lambda t: [t.update({rename(name): t.pop(name)}) for name in list(t)])
    tokens = draw_tokens(1, 70)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unread = peft_logits(plain, folder, tokens)
    message = refusal(driver(), folder)
    first = min(load_file(folder / WEIGHTS))
    assert f"tensor {first!r} has no place in this model; names are {Q0!r}" in message
    assert unread.isfinite().all()


@pytest.mark.parametrize("targets", (["lm_head", "q_proj"], ["embed_tokens"]))
def test_modules_that_are_no_linears_of_a_layer(driver: Any, plain: str, tmp_path: Path, targets: list[str]) -> None:
    message = refusal(driver(), save_adapter(plain, tmp_path, target_modules=targets))
    assert f"base_model.model.{'model.' if 'embed_tokens' in targets else ''}{targets[0]}" in message
    assert "has no place in this model" in message


def test_an_adapter_of_another_model(driver: Any, model_path: Any, tmp_path: Path) -> None:
    message = refusal(driver(), save_adapter(model_path("wide"), tmp_path, target_modules=["q_proj"]))
    assert str(tmp_path) in message
    assert "q_proj.lora_B" in message


def test_an_adapter_of_a_deeper_model(driver: Any, save_model: Any, tmp_path: Path) -> None:
    save_model(tmp_path / "deep", num_hidden_layers=3)
    message = refusal(driver(), save_adapter(str(tmp_path / "deep"), tmp_path / "adapter"))
    assert "model.layers.2." in message
    assert "to layer 1" in message


def test_truncated_weights(driver: Any, folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    assert str(path) in refusal(driver(), folder)
