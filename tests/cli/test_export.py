"""`coserve export`: the merged folder is what PEFT merges, and transformers reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_programs import Cli
from peft import PeftModel
from peft_adapters import publish
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM


@pytest.fixture(scope="module")
def adapter(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    artifacts = tmp_path_factory.mktemp("artifacts")
    return artifacts / publish(artifacts, model_folder, "one").path


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's own
def test_a_merged_model_is_pefts(cli: Cli, model_folder: Path, adapter: Path, tmp_path: Path) -> None:
    target = tmp_path / "merged"
    done = cli("export", adapter, "--merge", target, "--model", model_folder)
    assert (done.returncode, done.stdout) == (0, f"{target}\n")
    ids = torch.tensor([[5, 9, 12, 40, 7]])
    adapted = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(model_folder), adapter)
    with torch.no_grad():
        unmerged = adapted(ids).logits
        wanted = adapted.merge_and_unload()
        merged = LlamaForCausalLM.from_pretrained(target)
        assert torch.equal(merged(ids).logits, wanted(ids).logits)
        torch.testing.assert_close(merged(ids).logits, unmerged, rtol=1e-4, atol=1e-4)
        plain = LlamaForCausalLM.from_pretrained(model_folder)(ids).logits
    assert not torch.allclose(plain, unmerged, rtol=1e-2, atol=1e-2)  # or nothing was merged
    assert AutoTokenizer.from_pretrained(target)("one two").input_ids
    assert json.loads((target / "config.json").read_text()) == json.loads((model_folder / "config.json").read_text())
    assert not list(tmp_path.glob(".*.part"))


def test_the_base_model_is_the_one_that_the_adapter_names(
    cli: Cli, model_folder: Path, adapter: Path, tmp_path: Path
) -> None:
    assert cli("export", adapter, "--merge", tmp_path / "a").returncode == 0
    copied = tmp_path / "copy"
    assert cli("export", adapter, "--to", copied).returncode == 0
    assert not (copied / "manifest.json").exists()
    config = json.loads((copied / "adapter_config.json").read_text())
    (copied / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    done = cli("export", copied, "--merge", tmp_path / "b")
    assert done.returncode == 2 and "names no base model" in done.stderr
    before = load_file(adapter / "adapter_model.safetensors")
    assert before.keys() == load_file(copied / "adapter_model.safetensors").keys()


def test_what_is_there_is_left_alone(cli: Cli, model_folder: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    done = cli("export", adapter, "--merge", tmp_path / "full", "--model", model_folder)
    assert done.returncode == 2 and "is there and not empty" in done.stderr
    other = tmp_path / "other"
    other.mkdir()
    done = cli("export", adapter, "--merge", tmp_path / "x", "--model", other)
    assert done.returncode == 1 and "has no config.json" in done.stderr
    assert not (tmp_path / "x").exists()
