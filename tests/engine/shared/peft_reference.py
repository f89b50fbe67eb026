"""A PEFT model with the weights of an adapter."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from random_models import Adapter
from transformers import AutoModelForCausalLM, PreTrainedModel

from coserve_engine.messages import (
    TrainSeq,
)


def wrap_in_peft(base: PreTrainedModel, config: LoraConfig) -> PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(base, config, autocast_adapter_dtype=False)


def _peft_name(layer: int, name: str, part: str) -> str:
    block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    return f"base_model.model.model.layers.{layer}.{block}.{name}.lora_{part}.default.weight"


@dataclass(frozen=True)
class Reference:
    """A PEFT model with the weights of an Adapter."""

    model: PeftModel
    adapter: Adapter

    @classmethod
    def of(cls, folder: Path | str, dtype: torch.dtype, adapter: Adapter) -> Reference:
        """On the model in `folder`."""
        spec = adapter.layout.spec
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=list(spec.targets), lora_dropout=0.0)
        made = cls(wrap_in_peft(base, config), adapter)
        made.set_weights()
        return made

    def set_weights(self) -> None:
        rank, parameters = self.adapter.layout.spec.rank, dict(self.model.named_parameters())
        with torch.no_grad():
            for index, layer in enumerate(self.adapter.layout.views(self.adapter.flat)):
                for name, (a, b) in layer.items():
                    parameters[_peft_name(index, name, "A")].copy_(a[:rank])
                    parameters[_peft_name(index, name, "B")].copy_(b[:, :rank])

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        with torch.no_grad():
            return self.model(torch.tensor([tokens])).logits[0]

    def gradients(self, seqs: Iterable[TrainSeq]) -> tuple[float, torch.Tensor]:
        """Loss and gradient, in the layout of the adapter's flat buffer."""
        total = torch.zeros((), dtype=self.adapter.flat.dtype)
        for seq in seqs:
            logp = torch.log_softmax(self.model(torch.tensor([seq.tokens])).logits[0, :-1], -1)
            picked = logp.gather(1, torch.tensor(seq.tokens[1:]).unsqueeze(1)).squeeze(1)
            total = total - (picked * torch.tensor(seq.weights[1:], dtype=picked.dtype)).sum()
        total.backward()
        layout, parameters = self.adapter.layout, dict(self.model.named_parameters())
        flat = torch.zeros_like(self.adapter.flat)
        for index, layer in enumerate(layout.views(flat)):
            for name, (a, b) in layer.items():
                a[: layout.spec.rank] = parameters[_peft_name(index, name, "A")].grad
                b[:, : layout.spec.rank] = parameters[_peft_name(index, name, "B")].grad
        return total.item(), flat
