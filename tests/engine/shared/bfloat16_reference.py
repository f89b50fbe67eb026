"""What PEFT computes of a model in bfloat16 and in float64, to hold errors in bfloat16 to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft_reference import Reference
from random_models import Adapter
from transformers import AutoModelForCausalLM

from coserve_engine.messages import TrainSeq

if TYPE_CHECKING:
    import pytest


def rounded_folder(path: str, into: Path) -> str:
    """A model with weights that bfloat16 holds: errors are of arithmetic alone."""
    AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(into)
    return str(into)


def widen_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers computes RMSNorm in float32, even where the reference is float64."""
    to = torch.Tensor.to

    def kept(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        return self if self.dtype is torch.float64 and args == (torch.float32,) else to(self, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", kept)


@dataclass(frozen=True)
class Computed:
    """By PEFT in one dtype, of some samples.

    Args:
        loss: the weighted sum.
        logp: [all tokens but the first of each sample], of each token.
        gradient: [layout.size], in float64.
    """

    loss: float
    logp: torch.Tensor
    gradient: torch.Tensor


def reference_of(folder: str, adapter: Adapter, dtype: torch.dtype) -> Reference:
    """PEFT's model in `dtype`, float64 or bfloat16."""
    if dtype is torch.float64:
        adapter = replace(adapter, flat=adapter.flat.double())
    return Reference.of(folder, dtype, adapter)


def peft_gradient(reference: Reference, seqs: Sequence[TrainSeq], wide: torch.dtype) -> Computed:
    """The loss from logits in `wide`, as Trainers take it."""
    total, seen = torch.zeros((), dtype=wide), []
    for seq in seqs:
        logits = reference.model(torch.tensor([seq.tokens])).logits[0, :-1].to(wide)
        picked = torch.log_softmax(logits, -1).gather(1, torch.tensor(seq.tokens[1:]).unsqueeze(1)).squeeze(1)
        seen.append(picked.detach())
        total = total - (picked * torch.tensor(seq.weights[1:], dtype=wide)).sum()
    total.backward()
    layout, parameters = reference.adapter.layout, dict(reference.model.named_parameters())
    flat = torch.zeros(layout.size, dtype=torch.float64)
    for index, layer in enumerate(layout.views(flat)):
        for name, (a, b) in layer.items():
            (stem,) = (key for key in parameters if f"layers.{index}." in key and f"{name}.lora_A" in key)
            a[: layout.spec.rank] = parameters[stem].grad
            b[:, : layout.spec.rank] = parameters[stem.replace("lora_A", "lora_B")].grad
    return Computed(total.item(), torch.cat(seen).double(), flat)
