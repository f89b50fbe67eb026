"""What the driver carries through checkpoints: one log line for each optimizer step and each evaluation, and where it
stood.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace

from coserve_agent.errors import JobFailedError
from coserve_agent.jobs.evaluations import EVALUATIONS_FILE, EvalLog, EvalRecord
from coserve_api.job_status import FailedReason

LOG_FILE = "training_log.jsonl"
STATE_FILE = "driver.json"


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One finished optimizer step. `loss` is the mean over its supervised tokens; None where it is not finite.
    `samples` are lines of the data set.
    """

    step: int
    loss: float | None
    lr: float
    grad_norm: float | None
    tokens: int
    samples: tuple[int, ...]
    skipped: bool = False

    def line(self) -> str:
        values = asdict(self) | {"samples": list(self.samples)}
        if not self.skipped:
            del values["skipped"]
        return json.dumps(values, separators=(",", ":")) + "\n"


@dataclass(frozen=True, slots=True)
class DriverState:
    """Totals after `step` optimizer steps; `skipped_in_row` counts the last ones whose loss or gradient was not finite,
    `eval_step` is the one after which `eval_loss` (or the initial one) was measured.
    """

    step: int = 0
    tokens: int = 0
    skipped_in_row: int = 0
    loss: float | None = None
    eval_loss_initial: float | None = None
    eval_loss: float | None = None
    eval_step: int | None = None

    @property
    def improved(self) -> bool:
        """Whether the evaluation loss fell."""
        before, after = self.eval_loss_initial, self.eval_loss
        return before is not None and after is not None and after < before


@dataclass
class TrainingLog:
    """State and log lines of a job, always of the same step."""

    state: DriverState = field(default_factory=DriverState)
    _lines: list[str] = field(default_factory=list)
    evals: EvalLog = field(default_factory=EvalLog)

    def add(self, record: StepRecord) -> None:
        if record.step != self.state.step + 1:
            raise RuntimeError(f"step {record.step} is done, but {self.state.step + 1} is next")
        self._lines.append(record.line())
        self.state = replace(
            self.state,
            step=record.step,
            tokens=self.state.tokens + record.tokens,
            skipped_in_row=self.state.skipped_in_row + 1 if record.skipped else 0,
            loss=self.state.loss if record.loss is None else record.loss,
        )

    def note_eval(self, record: EvalRecord) -> None:
        """An evaluation after the steps so far; that after none is the initial one."""
        if record.step != self.state.step:
            raise RuntimeError(f"evaluated at step {record.step}, but {self.state.step} are done")
        state, initial = replace(self.state, eval_step=record.step), record.step == 0
        self.state = replace(state, eval_loss_initial=record.loss) if initial else replace(state, eval_loss=record.loss)
        self.evals = self.evals.plus(record)

    def check_best(self, kept_step: int | None) -> int | None:
        """The step of the weights that came back as the best, which an evaluation must have found to be so.

        Raises:
            JobFailedError: none did.
        """
        measured = {one.step for one in self.evals.records if one.loss is not None}
        if kept_step is not None and kept_step not in measured:
            raise _bad(f"its best weights are of step {kept_step}, of which {EVALUATIONS_FILE} has no loss")
        return kept_step

    def logs(self) -> dict[str, str]:
        """What goes with the adapter, too."""
        return {LOG_FILE: "".join(self._lines), EVALUATIONS_FILE: self.evals.text()}

    def files(self) -> dict[str, str]:
        """For a checkpoint's extra files."""
        return {**self.logs(), STATE_FILE: json.dumps(asdict(self.state), indent=1)}

    @classmethod
    def from_files(cls, files: dict[str, str], step: int) -> TrainingLog:
        """What `files` gave, back from the checkpoint of `step`.

        Raises:
            JobFailedError: the files are missing or of another step.
        """
        try:
            state = DriverState(**json.loads(files[STATE_FILE]))
            lines = files[LOG_FILE].splitlines(keepends=True)
            evals = EvalLog.from_text(files[EVALUATIONS_FILE]) if EVALUATIONS_FILE in files else _told_by(state)
        except (KeyError, ValueError, TypeError, RecursionError) as error:
            raise _bad(f"{STATE_FILE}, {LOG_FILE} or {EVALUATIONS_FILE} does not read ({error!r})") from None
        if state.step != step or len(lines) != step:
            raise _bad(
                f"{STATE_FILE} says step {state.step}, {LOG_FILE} has {len(lines)} lines, the state is of {step}"
            )
        last = evals.records[-1].step if evals.records else None
        if last != state.eval_step:
            raise _bad(f"{STATE_FILE} says eval_step {state.eval_step}, the last of {EVALUATIONS_FILE} is {last}")
        return cls(state, lines, evals)


def _told_by(state: DriverState) -> EvalLog:
    """What is known of the evaluations where no file has them, as in checkpoints of agents that kept none."""
    found = {0: state.eval_loss_initial} if state.eval_step is not None else {}
    if state.eval_step:
        found[state.eval_step] = state.eval_loss
    return EvalLog(tuple(EvalRecord(step, loss) for step, loss in found.items()))


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _bad(what: str) -> JobFailedError:
    return JobFailedError(FailedReason.ARTIFACT_STORE_ERROR, f"checkpoint: {what}; restore the artifact store")
