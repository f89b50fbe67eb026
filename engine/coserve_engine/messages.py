"""Commands into the engine and events out of it: frozen, plain, and the only things that cross its process boundary.

Times are seconds of `time.monotonic()`, which all processes of one machine share. Adapters are known here by version
only: names belong to the agent, and an unknown version is an error, never the base model. What concerns finetuning
jobs alone is defined in `job_messages`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from coserve_engine.job_messages import (
    AdapterExported,
    BestKept,
    CheckpointDone,
    Continued,
    ExportAdapter,
    ForwardBackward,
    JobCommand,
    JobEvent,
    JobFailed,
    JobStarted,
    JobStopped,
    KeepBest,
    LoraSpec,
    LossName,
    OptimStep,
    Pass,
    PassDone,
    PassMode,
    SaveCheckpoint,
    SetPriority,
    StartJob,
    StepDone,
    StopJob,
    TrainSeq,
)
from coserve_engine.request_messages import (
    MAX_LOGPROBS,
    AdapterVersion,
    AddRequest,
    Cancel,
    Emission,
    FinishReason,
    Grammar,
    GrammarKind,
    PromptDone,
    RequestFailed,
    SamplingParams,
    Token,
    TokenBatch,
    TokenLogprobs,
)

__all__ = [
    "MAX_LOGPROBS",
    "AdapterExported",
    "AdapterFailed",
    "AdapterLoaded",
    "AdapterVersion",
    "AddRequest",
    "BestKept",
    "Cancel",
    "CheckpointDone",
    "Command",
    "Continued",
    "CopyAdapter",
    "Emission",
    "EngineFailed",
    "EngineReady",
    "Event",
    "ExportAdapter",
    "FinishReason",
    "ForwardBackward",
    "Grammar",
    "GrammarKind",
    "IterationDone",
    "JobCommand",
    "JobEvent",
    "JobFailed",
    "JobStarted",
    "JobStopped",
    "KeepBest",
    "LoadAdapter",
    "LoadReport",
    "LoraSpec",
    "LossName",
    "OptimStep",
    "Pass",
    "PassDone",
    "PassMode",
    "PlainReason",
    "PromptDone",
    "RequestFailed",
    "SamplingParams",
    "SaveCheckpoint",
    "SetPriority",
    "SetReserve",
    "SetSlowdown",
    "Shutdown",
    "StartJob",
    "StepDone",
    "StopJob",
    "Token",
    "TokenBatch",
    "TokenLogprobs",
    "TrainSeq",
    "UnloadAdapter",
]

# ---- commands ----


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """Load a PEFT folder into a slot as `version`, which must not be loaded, or being loaded, already. Answered by
    AdapterLoaded or AdapterFailed.
    """

    version: AdapterVersion
    path: str


@dataclass(frozen=True, slots=True)
class CopyAdapter:
    """Serve as `version` a copy of the adapter that `job` trains, as it is after its last optimizer step. Requests for
    the version may follow at once. Answered by AdapterLoaded or AdapterFailed.
    """

    version: AdapterVersion
    job: str


@dataclass(frozen=True, slots=True)
class UnloadAdapter:
    """Drop `version` once no request uses it; new requests for it fail at once."""

    version: AdapterVersion


@dataclass(frozen=True, slots=True)
class SetReserve:
    """Keep so many seconds of each gap between two tokens free, from the next iteration on."""

    seconds: float


@dataclass(frozen=True, slots=True)
class SetSlowdown:
    """With finetuning an iteration may take so many percent longer, from the next one on; the newest counts. None: as
    the configuration says.
    """

    percent: float | None


@dataclass(frozen=True, slots=True)
class Shutdown:
    """End the engine process."""


Command = (
    AddRequest | Cancel | LoadAdapter | CopyAdapter | UnloadAdapter | JobCommand | SetReserve | SetSlowdown | Shutdown
)

# ---- events ----


@dataclass(frozen=True, slots=True)
class AdapterLoaded:
    """Its weights take so many `bytes`; of a copy, `step` optimizer steps were done."""

    version: AdapterVersion
    bytes: int
    step: int | None = None


@dataclass(frozen=True, slots=True)
class AdapterFailed:
    version: AdapterVersion
    message: str


@dataclass(frozen=True, slots=True)
class IterationDone:
    """What one iteration did.

    `finetune_tokens` counts forward rows of passes, `backward_tokens` rows x layers / layers; `predicted_s` is what its
    forward and the units that ran were expected to take; `paused_s` are the machine's pauses in it, `pauses_s` all
    until its end, turnarounds included; `excess_s` is how much later than planned its forward ended (None: no
    finetuning in it, nor between it and the forward before); `reserve_s` was kept free.
    """

    started_s: float
    duration_s: float
    until_s: float
    decode_tokens: int
    prefill_tokens: int
    finetune_tokens: int
    backward_tokens: float
    predicted_s: float
    paused_s: float = 0.0
    excess_s: float | None = None
    reserve_s: float = 0.0
    pauses_s: float = 0.0


@dataclass(frozen=True, slots=True)
class LoadReport:
    """The demand of inference alone, at most every 250 ms. `saturation_percent` is instantaneous; see load.py.

    Since the start: `prefix_queries` tokens were looked up in the cache, `prefix_hits` of them were found, and
    `preemptions` times a request gave its pages back.
    """

    at_s: float
    saturation_percent: float
    waiting: int
    running: int
    kv_used_pages: int
    kv_total_pages: int
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0


class PlainReason(StrEnum):
    """Why plain operators compute on a device that there are kernels for: triton does not work there, or the model's
    heads or widths are none that kernels take.
    """

    TRITON = "triton"
    HEAD_SIZE = "head_size"
    WIDTH = "width"


@dataclass(frozen=True, slots=True)
class EngineReady:
    """The model is loaded and the latency model calibrated; `notes` are lines for the log (device, kernels, numerics
    probe). `device` names what computes, where the engine chose it; `pass_tokens` those of the samples that share a
    pass. `plain_words`: how many words of an iteration plain operators compute though the device has kernels for them,
    and `plain_reason` why.
    """

    vocab_size: int
    max_model_length: int
    kv_total_pages: int
    page_tokens: int
    notes: tuple[str, ...]
    device: str = ""
    pass_tokens: int = 512
    plain_words: int = 0
    plain_reason: PlainReason | None = None


@dataclass(frozen=True, slots=True)
class EngineFailed:
    """The engine process cannot go on (for one, the model folder is broken).

    `message` names the file and the remedy.
    """

    message: str


Event = (
    TokenBatch
    | PromptDone
    | RequestFailed
    | AdapterLoaded
    | AdapterFailed
    | JobEvent
    | IterationDone
    | LoadReport
    | EngineReady
    | EngineFailed
)
