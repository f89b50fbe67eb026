"""Fifty optimizer steps give the losses that transformers' Trainer with PEFT gives."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from trainer_reference import UNLEARNED, Row, relative, trained

from coserve_engine.config import LINEARS
from coserve_engine.messages import ForwardBackward, LoraSpec, OptimStep, Pass, PassDone, StartJob, StepDone, TrainSeq

STEPS, MICROS, BATCH = 50, 2, 2
RATE, WARM_UP, DECAY, CLIP = 5e-3, 5, 0.01, 0.5
SPEC = LoraSpec(6, 12.0, LINEARS)
SEED = 11


class Samples:
    """Repetitive token sequences of unequal lengths, the prompt masked."""

    def __init__(self) -> None:
        source = random.Random(0)
        self.rows: list[tuple[tuple[int, ...], int]] = []
        for _ in range(STEPS * MICROS * BATCH):
            period = source.randint(2, 5)
            motif = [source.randrange(3, 11) for _ in range(period)]
            length = source.choice((8, 20, 90))
            self.rows.append((tuple(motif[i % period] for i in range(length)), period))

    def batches(self) -> list[list[Row]]:
        """Labelled, a micro-batch each."""
        rows = [Row(tokens, (UNLEARNED,) * prompt + tokens[prompt:]) for tokens, prompt in self.rows]
        return [rows[first : first + BATCH] for first in range(0, len(rows), BATCH)]

    def supervised(self, index: int) -> int:
        tokens, prompt = self.rows[index]
        return len(tokens) - prompt


@pytest.fixture(scope="module")
def trainer_curve(
    rig: Any, reference: Any, random_adapter: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[float], list[float]]:
    """(losses, gradient norms) of the Trainer, from the parameters with which our job begins."""
    executor = rig().executor
    adapter = random_adapter(executor, rank=SPEC.rank)
    assert adapter.layout.spec == SPEC
    adapter.flat.copy_(adapter.layout.fresh(SEED, executor.dtype, executor.device))
    model = reference(executor, adapter).model
    folder: Path = tmp_path_factory.mktemp("trainer")
    trainer = trained(
        model,
        Samples().batches(),
        folder,
        gradient_accumulation_steps=MICROS,
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="linear",
        warmup_steps=WARM_UP,
        weight_decay=DECAY,
        max_grad_norm=CLIP,
    )
    micro = trainer.losses
    norms = [float(entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry]
    return [sum(micro[i : i + MICROS]) for i in range(0, len(micro), MICROS)], norms


def rate(step: int) -> float:
    """Linear warm-up from 0, then linearly to 0."""
    if step < WARM_UP:
        return RATE * step / WARM_UP
    return RATE * (STEPS - step) / (STEPS - WARM_UP)


def engine_curve(d: Any, *, mean_of_means: bool = False) -> tuple[list[float], list[float]]:
    """(mean loss over the supervised tokens, gradient norm) of every step.

    With `mean_of_means`, each micro-batch is wrongly divided by its own supervised tokens.
    """
    samples = Samples()
    d.submit(StartJob("job", SPEC, SEED))
    seq_no, factors = 0, []
    for step in range(STEPS):
        first = step * MICROS * BATCH
        supervised = sum(samples.supervised(i) for i in range(first, first + MICROS * BATCH))
        for micro in range(MICROS):
            indices = range(first + micro * BATCH, first + (micro + 1) * BATCH)
            own = sum(samples.supervised(i) for i in indices)
            weight = 1 / (MICROS * own) if mean_of_means else 1 / supervised
            factors.append(1 / (weight * supervised))
            seqs = []
            for index in indices:
                tokens, prompt = samples.rows[index]
                seqs.append(TrainSeq(index, tokens, (0.0,) * prompt + (weight,) * (len(tokens) - prompt)))
            seq_no += 1
            d.submit(ForwardBackward("job", seq_no, Pass(seq_no, "job", step, micro, tuple(seqs))))
        seq_no += 1
        d.submit(OptimStep("job", seq_no, rate(step), weight_decay=DECAY, max_grad_norm=CLIP))
    d.run()
    micro_losses = [p.loss_sum * factor for p, factor in zip(d.of(PassDone), factors, strict=True)]
    losses = [sum(micro_losses[i : i + MICROS]) for i in range(0, len(micro_losses), MICROS)]
    return losses, [step.grad_norm for step in d.of(StepDone)]


def test_losses_are_the_trainers(driver: Any, trainer_curve: tuple[list[float], list[float]]) -> None:
    expected, expected_norms = trainer_curve
    losses, norms = engine_curve(driver())
    assert len(losses) == STEPS
    assert relative(losses, expected) < 1e-4
    assert relative(norms, expected_norms) < 1e-3
    assert sum(norm > CLIP for norm in norms) > STEPS // 2, "clipping did nothing"
    assert expected[-1] < 0.7 * expected[0], "nothing was learned"


def test_a_mean_of_micro_batch_means_is_another_curve(
    driver: Any, trainer_curve: tuple[list[float], list[float]]
) -> None:
    losses, _ = engine_curve(driver(), mean_of_means=True)
    assert relative(losses[:1], trainer_curve[0][:1]) < 1e-4, "before the first update they are the same model"
    assert relative(losses, trainer_curve[0]) > 1e-3
