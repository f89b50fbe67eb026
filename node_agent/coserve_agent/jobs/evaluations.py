"""The evaluations of a job: one line each in a file beside the training log, and what follows from them, such as which
was best. All of it is a function of the lines, so a checkpoint needs to carry nothing else.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from coserve_api.job_status import MAX_EVALUATIONS
from coserve_contract.messages import Evaluated

EVALUATIONS_FILE = "evaluations.jsonl"


@dataclass(frozen=True, slots=True)
class EvalRecord:
    """The mean loss over the supervised tokens of the held-out samples after `step` optimizer steps; None where it is
    not finite. `samples` and `tokens` count what was computed; None for an evaluation of an agent that kept no such
    file.
    """

    step: int
    loss: float | None
    samples: int | None = None
    tokens: int | None = None

    def message(self) -> Evaluated:
        return Evaluated(step=self.step, loss=self.loss)


@dataclass(frozen=True, slots=True)
class EvalLog:
    """The evaluations so far, oldest first."""

    records: tuple[EvalRecord, ...] = ()

    def plus(self, record: EvalRecord) -> EvalLog:
        return EvalLog((*self.records, record))

    @property
    def best(self) -> EvalRecord | None:
        """The one of the lowest loss, the earliest of equals; that before the first step takes part."""
        finite = [(one.loss, one.step, one) for one in self.records if one.loss is not None]
        return min(finite, default=(None, None, None))[2]

    def is_best(self, loss: float | None) -> bool:
        """Whether an evaluation with this loss would be the best so far."""
        best = self.best
        return loss is not None and (best is None or best.loss is None or loss < best.loss)

    def beats_kept(self, loss: float | None, kept_step: int | None) -> bool:
        """Whether it is below the initial one and that of the weights that are kept. They are those of `best`, but for
        a job that an agent began which kept none.
        """
        return EvalLog(tuple(one for one in self.records if one.step in (0, kept_step))).is_best(loss)

    @property
    def improved(self) -> bool:
        """Whether the best is of a step that was trained, so that there is something to publish."""
        return self.best is not None and self.best.step > 0

    @property
    def since_best(self) -> int:
        """How many evaluations came after the best, or in all where none was finite (the first is what others are
        compared with).
        """
        first = self.records[0].step if self.records else 0
        best = self.best.step if self.best is not None else first
        return sum(one.step > best for one in self.records)

    def last(self) -> tuple[Evaluated, ...]:
        """Those that are told."""
        return tuple(one.message() for one in self.records[-MAX_EVALUATIONS:])

    def best_message(self) -> Evaluated | None:
        return None if self.best is None else self.best.message()

    def text(self) -> str:
        return "".join(json.dumps(asdict(one), separators=(",", ":")) + "\n" for one in self.records)

    @classmethod
    def from_text(cls, text: str) -> EvalLog:
        """What `text` gave. ValueError or TypeError for anything else."""
        return cls(tuple(EvalRecord(**json.loads(line)) for line in text.splitlines()))
