"""Commands into the engine and events out of it: frozen, plain, and the only things that cross its process boundary.

Times are seconds of `time.monotonic()`, which all processes of one machine share. Adapters are known here by version
only: names belong to the agent, and an unknown version is an error, never the base model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """An immutable set of adapter weights: `uid` names the lineage (a job or a published name), `number` grows."""

    uid: str
    number: int


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """Shape of a LoRA adapter, in PEFT's terms.

    Args:
        rank: rows of A.
        alpha: the output is scaled by alpha / rank.
        targets: names among q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. `temperature` 0 is greedy; `seed` addresses the randomness of (seed, position)."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"


class PassMode(StrEnum):
    TRAIN = "train"
    EVAL = "eval"


@dataclass(frozen=True, slots=True)
class TrainSeq:
    """One tokenised sample. `weights[i]` multiplies the loss of predicting `tokens[i]` (index 0 is never predicted).

    For training the driver has divided the weights by the step's supervised tokens: the engine only sums.
    """

    uid: int
    tokens: tuple[int, ...]
    weights: tuple[float, ...]


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
class AddRequest:
    """Generate from `prompt` under `params`; `arrival_s` starts the clock of the time to first token."""

    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    arrival_s: float
    adapter: AdapterVersion | None = None


@dataclass(frozen=True, slots=True)
class Cancel:
    """Forget a request and free what it holds. No further event names it. Unknown ids are ignored."""

    request_id: str


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """Load a PEFT folder into a slot as `version`. Answered by AdapterLoaded or AdapterFailed."""

    version: AdapterVersion
    path: str


@dataclass(frozen=True, slots=True)
class UnloadAdapter:
    """Drop `version` once no request uses it; new requests for it fail at once."""

    version: AdapterVersion


@dataclass(frozen=True, slots=True)
class StartJob:
    """Create the training state of `job`, fresh from `seed` or from the checkpoint folder `resume`.

    Answered by JobStarted or JobFailed.
    """

    job: str
    lora: LoraSpec
    seed: int
    resume: str | None = None


@dataclass(frozen=True, slots=True)
class ForwardBackward:
    """Add the gradient of a TRAIN pass to the job's step, or compute the loss of an EVAL pass. Answered by PassDone."""

    job: str
    seq_no: int
    work: Pass


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
    """Write a PEFT folder with manifest at `path` once all earlier commands are done. Answered by AdapterExported."""

    job: str
    seq_no: int
    path: str
    base_model_name: str
    files: dict[str, str] = field(default_factory=dict)


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


@dataclass(frozen=True, slots=True)
class Shutdown:
    """End the engine process."""


Command = (
    AddRequest
    | Cancel
    | LoadAdapter
    | UnloadAdapter
    | StartJob
    | ForwardBackward
    | OptimStep
    | SaveCheckpoint
    | ExportAdapter
    | StopJob
    | Shutdown
)

# ---- events ----


@dataclass(frozen=True, slots=True)
class Token:
    """One sampled token of a request; `finish` is set on its last. `emitted_s` is when the engine had it."""

    request_id: str
    token: int
    finish: FinishReason | None
    emitted_s: float


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """All tokens of one iteration."""

    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """A request that cannot run; `code` is stable: unknown_adapter, context_length_exceeded, invalid_token,
    internal_error.
    """

    request_id: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class AdapterLoaded:
    version: AdapterVersion


@dataclass(frozen=True, slots=True)
class AdapterFailed:
    version: AdapterVersion
    message: str


@dataclass(frozen=True, slots=True)
class JobStarted:
    """`step` optimizer steps are done; `seq_no` is the last command covered; `files` came back from the checkpoint."""

    job: str
    step: int
    seq_no: int
    files: dict[str, str]


@dataclass(frozen=True, slots=True)
class PassDone:
    """`loss_sum` = sum of weight * -log p; `weight_sum` the sum of weights; `tokens` counts the pass's tokens."""

    job: str
    seq_no: int
    mode: PassMode
    loss_sum: float
    weight_sum: float
    tokens: int


@dataclass(frozen=True, slots=True)
class StepDone:
    """`skipped`: the gradient was not finite, nothing was changed. `grad_norm` is that before clipping."""

    job: str
    seq_no: int
    step: int
    grad_norm: float
    skipped: bool


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
    """The job's state is gone. `code`: invalid_checkpoint, invalid_command, artifact_store, internal_error."""

    job: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class IterationDone:
    """What one iteration did.

    `finetune_tokens` counts forward rows of passes, `backward_tokens` rows x layers / layers.
    """

    started_s: float
    duration_s: float
    until_s: float
    decode_tokens: int
    prefill_tokens: int
    finetune_tokens: int
    backward_tokens: float
    predicted_s: float


@dataclass(frozen=True, slots=True)
class LoadReport:
    """The demand of inference alone, at most every 250 ms. `saturation_percent` is instantaneous; see load.py."""

    at_s: float
    saturation_percent: float
    waiting: int
    running: int
    kv_used_pages: int
    kv_total_pages: int


@dataclass(frozen=True, slots=True)
class EngineReady:
    """The model is loaded and the latency model calibrated; `notes` are lines for the log (kernels, numerics probe)."""

    vocab_size: int
    max_model_length: int
    kv_total_pages: int
    page_tokens: int
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EngineFailed:
    """The engine process cannot go on (for one, the model folder is broken).

    `message` names the file and the remedy.
    """

    message: str


Event = (
    TokenBatch
    | RequestFailed
    | AdapterLoaded
    | AdapterFailed
    | JobStarted
    | PassDone
    | StepDone
    | CheckpointDone
    | AdapterExported
    | JobStopped
    | JobFailed
    | IterationDone
    | LoadReport
    | EngineReady
    | EngineFailed
)
