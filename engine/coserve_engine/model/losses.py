"""What a job minimises: a function of its targets' log-probabilities, and what it needs of them.

Every loss that we know of is one, so head, scheduler and transport do not care which it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from coserve_engine.device.protocol import Device, Pending
from coserve_engine.errors import JobError
from coserve_engine.job_messages import LossName, Pass, TrainSeq
from coserve_engine.numerics import Numerics

Coefficient = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(logp [N], weights [N], inputs [fields, N]) -> (loss [N], dloss/dlogp [N])."""


def _cross_entropy(
    logp: torch.Tensor, weights: torch.Tensor, inputs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """-w logp."""
    return -weights * logp, -weights


def _importance_sampling(
    logp: torch.Tensor, weights: torch.Tensor, inputs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """-w A exp(logp - old): the policy gradient of samples drawn with log-probability `old`; its own derivative."""
    old, advantages = inputs
    loss = -weights * advantages * (logp - old).exp()
    return loss, loss


@dataclass(frozen=True, slots=True)
class Loss:
    """`fields` names what a TrainSeq must carry beside its weights, in the order of the coefficient's inputs."""

    coefficient: Coefficient
    fields: tuple[str, ...] = ()

    def check(self, seq: TrainSeq) -> None:
        """Raises JobError where a field of `seq` is missing, of another length, or not finite."""
        for name in self.fields:
            values: tuple[float, ...] = getattr(seq, name)
            if len(values) != len(seq.tokens):
                raise JobError(
                    "invalid_command",
                    f"sample {seq.uid} has {len(seq.tokens)} tokens but {len(values)} {name}; send one for each token",
                )
            if not all(map(math.isfinite, values)):
                raise JobError("invalid_command", f"sample {seq.uid} has {name} that are not finite")


LOSSES: Mapping[LossName, Loss] = MappingProxyType(
    {
        LossName.CROSS_ENTROPY: Loss(_cross_entropy),
        LossName.IMPORTANCE_SAMPLING: Loss(_importance_sampling, ("old_logprobs", "advantages")),
    }
)


class LossTerms:
    """One pass's loss: the inputs of its rows, and the log-probabilities of its targets if they are wanted."""

    def __init__(
        self,
        loss: Loss,
        work: Pass,
        numerics: Numerics,
        dtype: torch.dtype,
        device: Device,
        *,
        want_logprobs: bool,
    ) -> None:
        self.loss = loss
        rows = []
        for name in loss.fields:
            row: list[float] = []
            for seq in work.seqs:
                length = len(seq.tokens)
                row += [*getattr(seq, name)[1:], *([0.0] * (numerics.pad(length) - length + 1))]
            rows.append(row)
        total = sum(numerics.pad(len(seq.tokens)) for seq in work.seqs)
        self.inputs = device.stage(rows, dtype).view(len(loss.fields), total)
        self.logp = torch.zeros(total, dtype=dtype, device=device.device) if want_logprobs else None
        self._fetched: Pending | None = None
        self._work, self._numerics = work, numerics

    def fetch(self, device: Device) -> None:
        """Begin to fetch what is wanted of it; the head is done."""
        if self.logp is not None:
            self._fetched = device.fetch(self.logp)

    @property
    def ready(self) -> bool:
        """Whether what is fetched is there."""
        return self._fetched is None or self._fetched.ready()

    def logprobs(self) -> tuple[tuple[float | None, ...], ...] | None:
        """Per sequence and token, None where none was computed; None where they are not wanted. To be fetched first."""
        if self._fetched is None:
            return None
        values, base, found = self._fetched.get(), 0, []
        for seq in self._work.seqs:
            kept = (values[base + n] if weight != 0 else None for n, weight in enumerate(seq.weights[1:]))
            found.append((None, *kept))
            base += self._numerics.pad(len(seq.tokens))
        return tuple(found)
