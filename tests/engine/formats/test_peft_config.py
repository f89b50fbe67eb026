"""adapter_config.json is what PEFT itself writes for the same settings, and its loaders find the base model by it."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig
from peft_folders import TOLERANCE, peft_logits

from coserve_engine.config import LINEARS
from coserve_engine.formats.peft_config import PEFT_VERSION, config_text
from coserve_engine.messages import AdapterExported, ExportAdapter, LoraSpec

BASE = "org/base-1b"


def peft_writes(folder: Path, spec: LoraSpec) -> dict[str, Any]:
    """What is in the file that PEFT saves beside weights."""
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=int(spec.alpha) if spec.alpha.is_integer() else spec.alpha,
        lora_dropout=spec.dropout,
        use_rslora=spec.use_rslora,
        target_modules=list(spec.targets),
        base_model_name_or_path=BASE,
        task_type="CAUSAL_LM",
        inference_mode=True,  # as PeftModel.save_pretrained sets it
    )
    config.save_pretrained(str(folder))
    saved: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return saved


@pytest.mark.parametrize(
    "spec",
    [
        LoraSpec(8, 16.0, LINEARS),
        LoraSpec(1, 0.5, ("q_proj", "v_proj"), dropout=0.05, use_rslora=True),
        LoraSpec(64, 4096.0, ("down_proj",)),
    ],
)
def test_every_field_is_as_peft_writes_it(tmp_path: Path, spec: LoraSpec) -> None:
    """But for target_modules' order: PEFT's is that of a set."""
    ours, theirs = json.loads(config_text(spec, spec.targets, BASE)), peft_writes(tmp_path, spec)
    for one in (ours, theirs):
        one["target_modules"] = sorted(one["target_modules"])
    if peft.__version__ != PEFT_VERSION:  # a user's PEFT may be another than the one whose fields are written
        ours = {name: value for name, value in ours.items() if name in theirs} | {"peft_version": peft.__version__}
    assert ours == theirs
    assert type(ours["lora_alpha"]) is type(theirs["lora_alpha"])


def test_another_field_would_be_found(tmp_path: Path) -> None:
    """Negative control: of other settings the objects differ."""
    spec = LoraSpec(8, 16.0, ("q_proj",))
    theirs = peft_writes(tmp_path, spec)
    assert json.loads(config_text(spec, spec.targets, BASE)) == theirs
    for other in (replace(spec, rank=4), replace(spec, dropout=0.1), replace(spec, use_rslora=True)):
        assert json.loads(config_text(other, other.targets, BASE)) != theirs


def test_the_auto_class_finds_the_base_model(
    driver: Any, plain: str, draw_tokens: Any, training: Any, start_job: Any, tmp_path: Path
) -> None:
    d, path, tokens = driver(), tmp_path / "adapter", draw_tokens(1, 40)
    d.submit(start_job(), *training(steps=2), ExportAdapter("job", 99, str(path), plain))
    d.run().one(AdapterExported)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = AutoPeftModelForCausalLM.from_pretrained(path)
        logits = model(torch.tensor([tokens])).logits[0]
    assert (logits - peft_logits(plain, path, tokens)).abs().max() < TOLERANCE
