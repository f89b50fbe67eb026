"""What the driver carries through checkpoints: one log line for each optimizer step, and where it stood."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace

from coserve_agent.errors import JobFailedError
from coserve_api.job import FailedReason

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

    def note_eval(self, loss: float) -> None:
        """The evaluation loss after the steps so far; that after none is the initial one."""
        state, value = replace(self.state, eval_step=self.state.step), finite(loss)
        initial = state.step == 0
        self.state = replace(state, eval_loss_initial=value) if initial else replace(state, eval_loss=value)

    def text(self) -> str:
        return "".join(self._lines)

    def files(self) -> dict[str, str]:
        """For a checkpoint's extra files."""
        return {LOG_FILE: self.text(), STATE_FILE: json.dumps(asdict(self.state), indent=1)}

    @classmethod
    def from_files(cls, files: dict[str, str], step: int) -> TrainingLog:
        """What `files` gave, back from the checkpoint of `step`.

        Raises:
            JobFailedError: the files are missing or of another step.
        """
        try:
            state = DriverState(**json.loads(files[STATE_FILE]))
            lines = files[LOG_FILE].splitlines(keepends=True)
        except (KeyError, ValueError, TypeError) as error:
            raise _bad(f"{STATE_FILE} or {LOG_FILE} does not read ({error!r})") from None
        if state.step != step or len(lines) != step:
            raise _bad(
                f"{STATE_FILE} says step {state.step}, {LOG_FILE} has {len(lines)} lines, the state is of {step}"
            )
        return cls(state, lines)


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _bad(what: str) -> JobFailedError:
    return JobFailedError(FailedReason.ARTIFACT_STORE_ERROR, f"checkpoint: {what}; restore the artifact store")
