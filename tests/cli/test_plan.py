"""`coserve plan`: what it says of autograd is what autograd saves; of this engine, what the engine's own plan says."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from cli_programs import Cli
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from coserve_cli.planning import autograd_bytes, fits, kept_bytes, lengths_of, settled
from coserve_engine.config import LINEARS
from coserve_engine.formats.model_folder import read_model_config
from coserve_engine.hardware import CPU, Hardware
from coserve_engine.job_messages import LoraSpec

TOKENS = 96


def saved_bytes(config: LlamaConfig, targets: tuple[str, ...], rank: int, *, checkpointing: bool = False) -> int:
    """Of what torch.autograd keeps in a forward of transformers' layers with PEFT's adapters."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=rank, target_modules=list(targets))).train()
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    ours = {each.untyped_storage().data_ptr() for each in model.parameters()}
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model.model(torch.arange(TOKENS)[None] % config.vocab_size, use_cache=False)
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in kept}
    return sum(size for place, size in storages.items() if place not in ours)


@pytest.mark.parametrize("targets", [LINEARS, ("q_proj", "v_proj"), ("o_proj", "down_proj"), ("gate_proj",)])
@pytest.mark.parametrize(("hidden", "heads", "kv_heads", "intermediate"), [(64, 4, 2, 160), (96, 8, 8, 128)])
def test_autograd_keeps_what_is_said(
    tmp_path: Path, targets: tuple[str, ...], hidden: int, heads: int, kv_heads: int, intermediate: int
) -> None:
    def config(layers: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=64, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=128,
            architectures=["LlamaForCausalLM"],
        )  # fmt: skip

    adapter = LoraSpec(8, 16.0, tuple(name for name in LINEARS if name in targets))
    one, two = (saved_bytes(config(layers), targets, 8) for layers in (2, 3))
    config(1).save_pretrained(tmp_path)
    shape = read_model_config(tmp_path)
    assert two - one == TOKENS * autograd_bytes(shape, adapter, 4, 4)


def test_checkpointing_keeps_the_input_of_a_layer(tmp_path: Path, model_folder: Path) -> None:
    config = LlamaConfig.from_pretrained(model_folder)
    sizes = []
    for layers in (2, 3):
        config.num_hidden_layers = layers
        sizes.append(saved_bytes(config, LINEARS, 8, checkpointing=True))
    shape = read_model_config(model_folder)
    said = kept_bytes(shape, LoraSpec(8, 16.0, LINEARS), "float32")
    assert sizes[1] - sizes[0] == TOKENS * said.checkpointing
    assert said.least < said.everything < said.autograd


def test_a_plan_names_its_parts_and_which_lengths_fit(cli: Cli, model_folder: Path) -> None:
    done = cli("plan", model_folder, "--device", "cpu")
    assert done.returncode == 0
    for words in ("parameters", "KV cache", "adapter, gradient, AdamW", "transformers and PEFT", "\n      256 "):
        assert words in done.stdout
    alone = cli("plan", model_folder, "--device", "cpu", "--no-finetuning").stdout
    assert "finetuning" not in alone and "autograd" not in alone
    small = cli("plan", model_folder, "--device", "cuda", "--memory", "4Mi")
    assert small.returncode == 1
    assert "does not fit" in small.stdout and "bytes too few for" in small.stdout


def test_under_a_budget_layers_are_computed_again(model_folder: Path) -> None:
    shape, hardware = read_model_config(model_folder), Hardware(CPU, "cpu", 1 << 34, 1 << 34)
    adapter = LoraSpec(8, 16.0, LINEARS)
    everything, bounded = (
        fits(shape, [settled(model_folder, hardware, "float32", 8, budget, 1, 256)], hardware, adapter, None, 1)[0]
        for budget in (None, 300_000)
    )
    assert everything.recomputed_layers == 0
    assert bounded.recomputed_layers > 0
    assert bounded.kept_bytes <= 300_000 < everything.kept_bytes < everything.autograd_bytes


def test_lengths_end_with_the_models_own(model_folder: Path) -> None:
    assert lengths_of(read_model_config(model_folder)) == [256]
