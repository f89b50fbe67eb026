"""Which job commands can be obeyed at all: a number that would ruin an adapter is refused before it is used."""

from __future__ import annotations

import math

from coserve_engine.config import LINEARS
from coserve_engine.errors import JobError
from coserve_engine.job_messages import Continued, ForwardBackward, LoraSpec, OptimStep, StartJob
from coserve_engine.limits import LARGEST, outside, shown
from coserve_engine.model.losses import LOSSES

MAX_DROPOUT = 0.9
MAX_SEED = 2**63 - 1
LEAST_EPSILON = 1e-12
"""AdamW divides by it where a gradient is zero, in float32."""
MAX_LEARNING_RATE = 1e3
BELOW_ONE = math.nextafter(1.0, 0.0)


def refused(what: str) -> JobError:
    return JobError("invalid_command", what)


def check_start(command: StartJob, max_rank: int) -> None:
    """Raises JobError for a job that cannot be trained here."""
    if isinstance(command.lora, Continued):  # the folder's own numbers are checked as it is read
        _check_range("dropout", command.lora.dropout, 0.0, MAX_DROPOUT)
    else:
        _check_lora(command.lora, max_rank)
    _check_range("seed", command.seed, 0, MAX_SEED)
    check_priority(command.priority)


def check_priority(priority: float) -> None:
    """Raises JobError for what is no weight."""
    if not 0.0 < priority <= LARGEST:
        raise refused(f"priority is {shown(priority)}; it must be a positive, finite weight")


def _check_lora(spec: LoraSpec, max_rank: int) -> None:
    if spec.rank < 1:
        raise refused(f"rank {shown(spec.rank)} is below 1; choose 1 to {max_rank}")
    if spec.rank > max_rank:
        raise refused(f"rank {shown(spec.rank)} is above finetuning.maxRank {max_rank}")
    _check_range("alpha", spec.alpha, -LARGEST, LARGEST)
    _check_range("dropout", spec.dropout, 0.0, MAX_DROPOUT)
    unknown = [name for name in spec.targets if name not in LINEARS]
    if unknown or not spec.targets:
        raise refused(f"targets {unknown or 'are none'}; name some of {list(LINEARS)}")


def check_step(command: OptimStep) -> None:
    """Raises JobError for an optimizer step that would leave parameters which are not finite."""
    for name, value, low, high in (
        ("lr", command.lr, 0.0, MAX_LEARNING_RATE),
        ("beta1", command.beta1, 0.0, BELOW_ONE),
        ("beta2", command.beta2, 0.0, BELOW_ONE),
        ("eps", command.eps, LEAST_EPSILON, 1.0),
        ("weight_decay", command.weight_decay, 0.0, LARGEST),
        ("max_grad_norm", command.max_grad_norm, 0.0, LARGEST),
    ):
        _check_range(name, value, low, high)
    _check_range("lr * weight_decay", command.lr * command.weight_decay, 0.0, 1.0)


def check_pass(command: ForwardBackward, max_length: int, vocab_size: int) -> None:
    """Raises JobError for a pass that is empty, has no supervised token, or holds a sample that cannot be computed."""
    if command.loss not in LOSSES:
        raise refused(f"loss is {command.loss!r}; it must be one of {[str(name) for name in LOSSES]}")
    if not command.work.seqs:
        raise refused(f"pass {command.work.id} has no sequence")
    for seq in command.work.seqs:
        where = f"sample {seq.uid}"
        if not 2 <= len(seq.tokens) <= max_length:
            raise refused(f"{where} has {len(seq.tokens)} tokens; 2 to {max_length} are allowed")
        if len(seq.weights) != len(seq.tokens):
            raise refused(f"{where} has {len(seq.tokens)} tokens but {len(seq.weights)} weights")
        wrong = [token for token in seq.tokens if not 0 <= token < vocab_size]
        if wrong:
            raise refused(f"{where} has token {shown(wrong[0])}, outside the vocabulary of {vocab_size}")
        LOSSES[command.loss].check(seq)
    if not any(any(seq.weights[1:]) for seq in command.work.seqs):
        raise refused(f"{where} and the rest of its pass have no supervised token: every weight is 0")


def _check_range(name: str, value: float, low: float, high: float) -> None:
    wrong = outside(value, low, high)
    if wrong:
        raise refused(f"{name} {wrong}")
