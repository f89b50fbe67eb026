"""Adapters that PEFT itself writes, as a job would publish them."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from coserve_contract.messages import AdapterRecord


def publish(
    artifacts: Path, model: Path, name: str, number: int = 1, seed: int = 0, rank: int = 4, alpha: int = 64
) -> AdapterRecord:
    """Write a version below `artifacts`; another `seed` is another adapter."""
    torch.manual_seed(seed)
    base = LlamaForCausalLM.from_pretrained(model)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False
    )
    path = artifacts / "adapters" / name / f"v{number}"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        get_peft_model(base, config).save_pretrained(path)
    return seal(artifacts, name, number, rank)


def seal(artifacts: Path, name: str, number: int = 1, rank: int = 4) -> AdapterRecord:
    """Write the manifest of a version as its files are now; return what Redis says of it."""
    path = artifacts / "adapters" / name / f"v{number}"
    files = {
        one.name: {"sha256": hashlib.sha256(one.read_bytes()).hexdigest(), "bytes": one.stat().st_size}
        for one in path.iterdir()
        if one.name.startswith("adapter")
    }
    manifest = json.dumps({"version": 1, "files": files}).encode()
    (path / "manifest.json").write_bytes(manifest)
    relative = path.relative_to(artifacts).as_posix()
    digest = hashlib.sha256(manifest).hexdigest()
    return AdapterRecord(name=name, number=number, path=relative, sha256=digest, job_uid="j", rank=rank)
