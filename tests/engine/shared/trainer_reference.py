"""transformers' Trainer on micro-batches in their order, with its losses at full precision."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

UNLEARNED = -100
"""As a label: this token's loss does not count."""


class Row(NamedTuple):
    """A sample as the Trainer takes it."""

    tokens: tuple[int, ...]
    labels: tuple[int, ...]


class Batches(Dataset[dict[str, torch.Tensor]]):
    """Micro-batches of whatever sizes, padded, each an item."""

    def __init__(self, batches: Sequence[Sequence[Row]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rows = self.batches[index]

        def pad(values: Iterable[Sequence[int]], value: int) -> torch.Tensor:
            return pad_sequence([torch.tensor(one) for one in values], batch_first=True, padding_value=value)

        return {
            "input_ids": pad((row.tokens for row in rows), 0),
            "labels": pad((row.labels for row in rows), UNLEARNED),
            "attention_mask": pad(([1] * len(row.tokens) for row in rows), 0),
        }


def only(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    (item,) = items
    return item


class Recorder(Trainer):
    """Micro-batches in their order; the loss of each at full precision."""

    losses: list[float]

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(float(loss))
        return loss


def trained(model: Any, batches: Sequence[Sequence[Row]], folder: Path, **settings: Any) -> Recorder:
    """The Trainer after it trained `model` with AdamW; `settings` are TrainingArguments'."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        optim="adamw_torch",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        **settings,
    )
    trainer = Recorder(model=model, args=arguments, train_dataset=Batches(batches), data_collator=only)
    trainer.losses = []
    trainer.train()
    return trainer


def mean_loss(model: PreTrainedModel, rows: Sequence[Row]) -> float:
    """Over all learned tokens of all rows."""
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            logits = model(torch.tensor([row.tokens])).logits[0, :-1]
            labels = torch.tensor(row.labels[1:])
            total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=UNLEARNED, reduction="sum"))
            count += int((labels != UNLEARNED).sum())
    return total / count


def relative(found: Sequence[float], expected: Sequence[float]) -> float:
    """The worst relative error."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
