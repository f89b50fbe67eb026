"""Commands of a finetuning job and the events that answer them: frozen, plain, ordered and numbered.

A job is a stream of commands, idempotent by `seq_no`; a data set's driver issues what a remote client would.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """Shape of a LoRA adapter, in PEFT's terms.

    Args:
        rank: rows of A.
        alpha: the output is scaled by alpha / rank.
        targets: names among q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj.
        dropout: probability that an input of A is dropped in training. It is no part of the shape, so two specs that
            differ in it are equal and a checkpoint of one fits the other.
        use_rslora: scale by alpha / sqrt(rank) instead (Kalajdzievski, A Rank Stabilization Scaling Factor, 2023).
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float = field(default=0.0, compare=False)
    use_rslora: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@dataclass(frozen=True, slots=True)
class Continued:
    """Go on from the adapter in folder `path` (PEFT's): weights and shape are taken over.

    Rank, alpha, targets and use_rslora may be set; the folder's must then be the same. Dropout is the job's own.
    """

    path: str
    dropout: float = 0.0
    rank: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] | None = None
    use_rslora: bool | None = None


class LossName(StrEnum):
    """The losses of `losses`."""

    CROSS_ENTROPY = "cross_entropy"
    IMPORTANCE_SAMPLING = "importance_sampling"


class PassMode(StrEnum):
    TRAIN = "train"
    EVAL = "eval"


@dataclass(frozen=True, slots=True)
class TrainSeq:
    """One tokenised sample. `weights[i]` multiplies the loss of predicting `tokens[i]` (index 0 is never predicted).

    For training the driver has divided the weights by the step's supervised tokens: the engine only sums. `uid`, `turn`
    (of several samples with one uid) and `epoch` (the time through the data), both from 0, address the dropout of its
    rows. `old_logprobs` and `advantages` are per token like the weights, for the losses that name them.
    """

    uid: int
    tokens: tuple[int, ...]
    weights: tuple[float, ...]
    epoch: int = 0
    old_logprobs: tuple[float, ...] = ()
    advantages: tuple[float, ...] = ()
    turn: int = 0


@dataclass(frozen=True, slots=True)
class Pass:
    """Sequences that go through forward and backward together; `micro` is its place in the optimizer step's sum."""

    id: int
    job: str
    step: int
    micro: int
    seqs: tuple[TrainSeq, ...]
    mode: PassMode = PassMode.TRAIN


# ---- commands ----


@dataclass(frozen=True, slots=True)
class StartJob:
    """Create the training state of `job`: fresh from `seed`, with the weights of another adapter, or from the
    checkpoint folder `resume`.

    Answered by JobStarted or JobFailed; commands that come before the answer wait for it. Jobs that compute at the same
    time share the finetuning time in proportion to `priority`, a positive weight.
    """

    job: str
    lora: LoraSpec | Continued
    seed: int
    resume: str | None = None
    priority: float = 1.0


@dataclass(frozen=True, slots=True)
class SetPriority:
    """Give a job another weight from now on. Not answered; of a job that does not run it means nothing."""

    job: str
    priority: float


@dataclass(frozen=True, slots=True)
class ForwardBackward:
    """Add the gradient of a TRAIN pass to the job's step, or compute the loss of an EVAL pass. Answered by PassDone,
    with the targets' log-probabilities if `want_logprobs`.
    """

    job: str
    seq_no: int
    work: Pass
    loss: LossName = LossName.CROSS_ENTROPY
    want_logprobs: bool = False


@dataclass(frozen=True, slots=True)
class OptimStep:
    """Clip the summed gradient to `max_grad_norm` (0: never), apply AdamW, clear the gradient. Answered by StepDone."""

    job: str
    seq_no: int
    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


@dataclass(frozen=True, slots=True)
class KeepBest:
    """Keep a copy of the adapter as it is once all earlier commands are done, in place of the one kept before. It is
    part of every later checkpoint. Answered by BestKept.
    """

    job: str
    seq_no: int


@dataclass(frozen=True, slots=True)
class SaveCheckpoint:
    """Write a checkpoint folder at `path` once all earlier commands of the job are done. Answered by CheckpointDone.

    `files` are small extra files (name -> text) that the driver wants back at resume, covered by the manifest.
    """

    job: str
    seq_no: int
    path: str
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ExportAdapter:
    """Write a PEFT folder with manifest at `path` once all earlier commands are done: the adapter as it is then, or
    with `best` as KeepBest kept it. Answered by AdapterExported.
    """

    job: str
    seq_no: int
    path: str
    base_model_name: str
    files: dict[str, str] = field(default_factory=dict)
    best: bool = False


@dataclass(frozen=True, slots=True)
class StopJob:
    """Drop the job's waiting commands and live passes and forget its state. Answered by JobStopped.

    Nothing is written: work since the last optimizer step is replayed by whoever resumes from the last checkpoint. With
    `checkpoint`, the state as of the last finished optimizer step is saved first (valid only when no gradient of the
    running step has been summed, which dropping the running step's passes guarantees).
    """

    job: str
    checkpoint: str | None = None
    files: dict[str, str] = field(default_factory=dict)


StreamCommand = ForwardBackward | OptimStep | KeepBest | SaveCheckpoint | ExportAdapter
"""What a job does in order."""
JobCommand = StartJob | SetPriority | StreamCommand | StopJob

# ---- events ----


@dataclass(frozen=True, slots=True)
class JobStarted:
    """`step` optimizer steps are done; `seq_no` is the last command covered; `files` came back from the checkpoint.

    `lora` is the adapter's shape, also where it was taken over; `best_step` is after which step KeepBest kept what the
    checkpoint brought back.
    """

    job: str
    step: int
    seq_no: int
    files: dict[str, str]
    lora: LoraSpec
    best_step: int | None = None


@dataclass(frozen=True, slots=True)
class PassDone:
    """`loss_sum` is the sum of the tokens' losses, `weight_sum` that of their weights, `tokens` their number.

    `logprobs`: per sequence and token log p of the token, None at index 0 and where the weight is zero.
    """

    job: str
    seq_no: int
    mode: PassMode
    loss_sum: float
    weight_sum: float
    tokens: int
    logprobs: tuple[tuple[float | None, ...], ...] | None = None


@dataclass(frozen=True, slots=True)
class StepDone:
    """`skipped`: a loss or the gradient was not finite, nothing was changed. `grad_norm` is that before clipping."""

    job: str
    seq_no: int
    step: int
    grad_norm: float
    skipped: bool


@dataclass(frozen=True, slots=True)
class BestKept:
    """The adapter as it is after `step` optimizer steps is kept."""

    job: str
    seq_no: int
    step: int


@dataclass(frozen=True, slots=True)
class CheckpointDone:
    job: str
    seq_no: int
    step: int
    path: str
    sha256: str


@dataclass(frozen=True, slots=True)
class AdapterExported:
    job: str
    seq_no: int
    path: str
    sha256: str


@dataclass(frozen=True, slots=True)
class JobStopped:
    """`checkpoint` is the sha256 of the checkpoint that StopJob asked for; `step` the optimizer steps it covers."""

    job: str
    step: int
    checkpoint: str | None


@dataclass(frozen=True, slots=True)
class JobFailed:
    """A command could not be obeyed. `code`: job_running, the job runs already and goes on; with invalid_checkpoint,
    other_arithmetic (a checkpoint that is of another dtype), invalid_adapter (the one to go on from), invalid_command,
    artifact_store and internal_error its state is gone.
    """

    job: str
    code: str
    message: str


JobEvent = JobStarted | PassDone | StepDone | BestKept | CheckpointDone | AdapterExported | JobStopped | JobFailed
