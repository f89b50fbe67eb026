"""Commands that the engine has but has not finished: steps and evaluations, and what their events add up to."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from coserve_agent.engine.pass_bounds import PassBounds
from coserve_agent.errors import JobFailedError
from coserve_agent.jobs.evaluations import EvalRecord
from coserve_agent.jobs.passes import split_passes, to_seqs, weight_sum
from coserve_agent.jobs.schedule import learning_rate
from coserve_agent.jobs.trainlog import StepRecord, finite
from coserve_api.job_status import FailedReason
from coserve_contract.messages import BindingSpec
from coserve_contract.shards import Shard
from coserve_engine.messages import Command, ForwardBackward, OptimStep, Pass, PassDone, StepDone


@dataclass(slots=True)
class _OpenStep:
    """A step whose commands are submitted; `samples` are its lines, `optim_seq` is that of its OptimStep."""

    step: int
    lr: float
    samples: tuple[int, ...]
    passes: set[int]
    optim_seq: int = 0
    loss: float = 0.0
    tokens: int = 0


class OpenSteps:
    """The steps in flight, oldest first. `pass_ids` are unique over the engine's life."""

    def __init__(
        self, job: str, spec: BindingSpec, total_steps: int, bounds: PassBounds, pass_ids: Iterator[int]
    ) -> None:
        self._job = job
        self._bounds = bounds
        self._spec = spec
        self._total_steps = total_steps
        self._pass_ids = pass_ids
        self._open: deque[_OpenStep] = deque()

    def __len__(self) -> int:
        return len(self._open)

    def begin(self, step: int, shard: Shard, seq: Iterator[int]) -> list[Command]:
        """The commands of `step`: its passes, whose weights sum to one, then the optimizer."""
        spec = self._spec
        lr = learning_rate(spec.schedule, step - 1, spec.learning_rate, spec.warmup_steps, self._total_steps)
        divisor = weight_sum(shard.samples)
        lines = tuple(dict.fromkeys(sample.id for sample in shard.samples))
        current = _OpenStep(step, lr, lines, set())
        commands: list[Command] = []
        for micro, part in enumerate(split_passes(shard.samples, self._bounds)):
            seq_no = next(seq)
            current.passes.add(seq_no)
            work = Pass(next(self._pass_ids), self._job, step, micro, to_seqs(part, divisor, shard.epoch))
            commands.append(ForwardBackward(self._job, seq_no, work))
        current.optim_seq = next(seq)
        commands.append(
            OptimStep(
                self._job,
                current.optim_seq,
                lr,
                beta1=spec.adam_beta1,
                beta2=spec.adam_beta2,
                eps=spec.adam_epsilon,
                weight_decay=spec.weight_decay,
                max_grad_norm=spec.max_grad_norm,
            )
        )
        self._open.append(current)
        return commands

    def on_pass(self, event: PassDone) -> None:
        for current in self._open:
            if event.seq_no in current.passes:
                current.loss += event.loss_sum
                current.tokens += event.tokens

    def on_optim(self, event: StepDone) -> StepRecord:
        """The oldest step is done.

        Raises:
            JobFailedError: the engine did another one.
        """
        current = self._open.popleft()
        if current.optim_seq != event.seq_no or current.step != event.step:
            raise JobFailedError(
                FailedReason.INTERNAL_ERROR, f"the engine did step {event.step}, and step {current.step} was next"
            )
        return StepRecord(
            step=current.step,
            loss=None if event.skipped else finite(current.loss),
            lr=current.lr,
            grad_norm=finite(event.grad_norm),
            tokens=current.tokens,
            samples=current.samples,
            skipped=event.skipped,
        )


@dataclass(slots=True)
class Evaluation:
    """A running evaluation; `pending` are the passes that are not done."""

    pending: set[int] = field(default_factory=set)
    _samples: int = 0
    _tokens: int = 0
    _loss_sum: float = 0.0
    _weight_sum: float = 0.0

    def begin(self, work: Pass, seq_no: int) -> ForwardBackward:
        self.pending.add(seq_no)
        self._samples += len(work.seqs)
        return ForwardBackward(work.job, seq_no, work)

    def on_pass(self, event: PassDone) -> None:
        self.pending.discard(event.seq_no)
        self._loss_sum += event.loss_sum
        self._weight_sum += event.weight_sum
        self._tokens += event.tokens

    def record(self, step: int) -> EvalRecord:
        """What came of it: the mean over all supervised tokens."""
        return EvalRecord(step, finite(self._loss_sum / self._weight_sum), self._samples, self._tokens)
