"""What operator, agents and feeders tell each other through Redis: JSON with a version.

Within a version fields are only added, with defaults, and unknown ones are ignored, since old and new agents live side
by side during a rolling update. A change of meaning is a new version, which an old reader refuses by name.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from coserve_api.adapters import MAX_ADAPTERS
from coserve_api.common import BatchSize, Rank, Seed, Sha256, SlowdownPercent, TemplateVariables, Uid
from coserve_api.job import PublishPolicy, Schedule, TargetModule
from coserve_api.job_status import MAX_EVALUATIONS, FailedReason
from coserve_api.uris import FolderPath, RelativePath
from coserve_contract.message import Message, Part, message_error, parsed

MOST_FAILURES, MOST_REASON = 32, 500
"""What a heartbeat says of adapters that did not load: of so many, in so many characters."""
Name = Annotated[str, Field(min_length=1, max_length=253)]
AgentId = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9.-]*$")]
Prose = Annotated[str, Field(max_length=2048)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Epoch = Annotated[int, Field(ge=1, le=2**53)]
Number = Annotated[int, Field(ge=1, le=2**31 - 1)]
Ratio = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Loss = Annotated[float, Field(allow_inf_nan=False)]


# ---- heartbeat ----


class Load(Part):
    """Demand of inference alone; `saturation_percent` is averaged over 15 s, `kv_percent` is the share of KV pages that
    inference holds.
    """

    saturation_percent: Ratio = 0.0
    waiting: Count = 0
    running: Count = 0
    kv_percent: Ratio = 0.0


class SloReport(Part):
    """The last minute of one agent. Without a request in it the figures are None."""

    ttft_p99_ms: Ratio | None = None
    tpot_p99_ms: Ratio | None = None
    attainment_percent: Annotated[float, Field(ge=0, le=100)] | None = None
    requests: Count = 0


class JobBeat(Part):
    """A job that the agent runs, under which binding, and how far it is."""

    epoch: Epoch
    step: Count


class AdapterFailure(Part):
    """A published version that the agent could not load, after `tries` tries; it goes on trying."""

    name: Annotated[str, Field(min_length=1, max_length=63)]
    number: Number
    tries: Annotated[int, Field(ge=1)] = 1
    reason: Annotated[str, Field(max_length=MOST_REASON)] = ""


class Heartbeat(Message):
    """An agent, every second. `max_jobs`: how many jobs it can run at once; `error`: why the model is not loaded;
    `device`: what its engine computes on, once it is; `failed_adapters`: at most MOST_FAILURES of them.
    """

    agent_id: AgentId
    pod_name: Name
    pod_uid: Uid
    boot_id: Uid
    node: Annotated[str, Field(max_length=253)] = ""
    ready: bool
    draining: bool = False
    model_loaded: bool = True
    error: Prose = ""
    device: Annotated[str, Field(max_length=253)] = ""
    max_jobs: Annotated[int, Field(ge=0, le=64)] = 1
    load: Load = Field(default_factory=Load)
    slo: SloReport = Field(default_factory=SloReport)
    adapters: Annotated[dict[Name, Number], Field(max_length=1024)] = Field(default_factory=dict)
    failed_adapters: Annotated[tuple[AdapterFailure, ...], Field(max_length=MAX_ADAPTERS)] = ()
    jobs: Annotated[dict[Uid, JobBeat], Field(max_length=64)] = Field(default_factory=dict)

    @property
    def state(self) -> tuple[Any, ...]:
        """What is a reason for the operator to look at once; all else are figures."""
        jobs = tuple(sorted((job, run.epoch) for job, run in self.jobs.items()))
        adapters = tuple(sorted(self.adapters.items()))
        state = (self.ready, self.draining, self.model_loaded, self.error, self.max_jobs, self.failed_adapters)
        return (*state, jobs, adapters)


# ---- checkpoints and bindings ----


class Checkpoint(Message):
    """An accepted checkpoint: `path` below the artifact store, `cursor` the last shard it covers, `sha256` that of
    manifest.json.
    """

    step: Count
    cursor: Count
    epoch: Epoch
    path: RelativePath
    sha256: Sha256


class Desired(StrEnum):
    RUN = "Run"
    STOP = "Stop"


class Start(Part):
    """The adapter that a job goes on from: its folder, below the artifact store or absolute, and what the job says of
    its shape; None is taken over. `sha256`: of the manifest, where it was published here.
    """

    path: FolderPath
    sha256: Sha256 | None = None
    rank: Rank | None = None
    alpha: Annotated[int, Field(ge=1, le=4096)] | None = None
    target_modules: Annotated[tuple[TargetModule, ...], Field(min_length=1, max_length=7)] | None = None
    use_rslora: bool | None = None


_LIVE = ("checkpoint_every_steps", "checkpoint_keep", "publish", "priority", "max_slowdown_percent")


class BindingSpec(Part):
    """All that an agent needs of a FinetuneJob's spec. `adapter_number` is N of the version vN it will publish;
    `max_slowdown_percent` is the endpoint's, so that it reaches an agent that runs.

    Fields with defaults are younger than version 1: an operator that does not know them leaves them out. But rank,
    alpha and target_modules are left out exactly where `start` is set, so that an agent that knows no `start` refuses
    the binding instead of beginning with random weights.
    """

    job_uid: Uid
    job_name: Name
    namespace: Name
    adapter_name: Annotated[str, Field(min_length=1, max_length=63)]
    adapter_number: Number
    rank: Rank | None = None
    alpha: Annotated[int, Field(ge=1, le=4096)] | None = None
    target_modules: Annotated[tuple[TargetModule, ...], Field(min_length=1, max_length=7)] | None = None
    learning_rate: Annotated[float, Field(gt=0, le=1)]
    schedule: Schedule
    warmup_steps: Count
    batch_size: BatchSize
    weight_decay: Annotated[float, Field(ge=0, le=1)]
    max_grad_norm: Ratio
    seed: Seed
    checkpoint_every_steps: Annotated[int, Field(ge=1, le=1000)]
    checkpoint_keep: Annotated[int, Field(ge=1, le=100)]
    publish: PublishPolicy
    dropout: Annotated[float, Field(ge=0, le=0.9)] = 0.0
    use_rslora: bool = False
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    adam_epsilon: Annotated[float, Field(ge=1e-12, le=1)] = 1e-8
    eval_every_steps: Count = 0
    patience: Annotated[int, Field(ge=1)] | None = None
    start: Start | None = None
    priority: Annotated[int, Field(ge=-4, le=4)] = 0
    template_variables: TemplateVariables = Field(default_factory=dict)
    max_slowdown_percent: SlowdownPercent | None = None

    @property
    def weight(self) -> float:
        """The job's share of the finetuning time is in proportion to this."""
        return float(2.0**self.priority)

    @property
    def live(self) -> dict[str, Any]:
        """What may change while the job runs; an agent takes it over from the binding as it is now."""
        return {name: getattr(self, name) for name in _LIVE}

    @model_validator(mode="after")
    def _one_shape(self) -> BindingSpec:
        if any((one is None) != (self.start is not None) for one in (self.rank, self.alpha, self.target_modules)):
            raise ValueError("rank, alpha and target_modules are set exactly where start is not")
        return self


class Binding(Message):
    """What an agent should do with a job. `resume` is the checkpoint that the operator knew; the one to resume from is
    what taking the lease returns.
    """

    epoch: Epoch
    desired: Desired = Desired.RUN
    spec: BindingSpec
    restarts: Count = 0
    resume: Checkpoint | None = None


class AdapterRecord(Message):
    """A published version that every agent loads: `number` is N of vN, `path` its folder below the artifact store. One
    that no job published (`job_uid` is its own) may have a longer name.
    """

    name: Annotated[str, Field(min_length=1, max_length=128)]
    number: Number
    path: RelativePath
    sha256: Sha256
    job_uid: Uid
    rank: Rank


# ---- progress and end of a job ----


class Evaluated(Part):
    """The loss over the held-out samples after `step` optimizer steps; None where it was not finite."""

    step: Count
    loss: Loss | None = None


Evaluations = Annotated[tuple[Evaluated, ...], Field(max_length=MAX_EVALUATIONS)]


class Progress(Message):
    """How far a job is: `step` optimizer steps done, `cursor` the last shard read (what the feeder's bound counts
    from), `eval_cursor` the last held-out shard that the agent keeps itself. `evaluations` are the last ones, `best` is
    the one of the lowest loss. `rewound`: why this binding went on from an older checkpoint than the accepted one.
    """

    epoch: Epoch
    step: Count
    cursor: Count
    eval_cursor: Count | None = None
    total_steps: Count
    tokens: Count = 0
    loss: Loss | None = None
    learning_rate: Ratio | None = None
    eval_loss_initial: Loss | None = None
    eval_loss: Loss | None = None
    evaluations: Evaluations = ()
    best: Evaluated | None = None
    tokens_per_second: Ratio | None = None
    eta_seconds: Ratio | None = None
    rewound: Prose = ""


class AdapterFiles(Part):
    """The version that a job wrote: `number` is N of vN, `path` its folder below the artifact store, `sha256` that of
    manifest.json.
    """

    name: Annotated[str, Field(min_length=1, max_length=63)]
    number: Number
    path: RelativePath
    sha256: Sha256


class Completed(Message):
    """All steps are done, or patience ended the job after `step` of them. `adapter` is None where the publish policy
    asks for none; `publish` is the one that it was decided by, `rank` the adapter's.
    """

    outcome: Literal["Completed"] = "Completed"
    epoch: Epoch
    step: Count
    tokens: Count = 0
    adapter: AdapterFiles | None = None
    publish: PublishPolicy | None = None
    loss: Loss | None = None
    eval_loss_initial: Loss | None = None
    eval_loss: Loss | None = None
    evaluations: Evaluations = ()
    best: Evaluated | None = None
    rank: Rank | None = None


class Failed(Message):
    """The job cannot go on anywhere, whenever it is tried; `message` says what to change."""

    outcome: Literal["Failed"] = "Failed"
    epoch: Epoch
    reason: FailedReason
    message: Prose


class Released(Message):
    """The agent gave the job back; the accepted checkpoint is where to go on. With `reason` the agent could not go on,
    and another attempt may; without, it was asked to, or drains.
    """

    outcome: Literal["Released"] = "Released"
    epoch: Epoch
    step: Count
    message: Prose = ""
    reason: FailedReason | None = None


JobResult = Annotated[Completed | Failed | Released, Field(discriminator="outcome")]
_JOB_RESULT: TypeAdapter[Any] = TypeAdapter(JobResult)


def load_result(key: str, raw: bytes | str) -> Completed | Failed | Released:
    """Parse a JobResult; MessageError as in `Message.loads`."""
    try:
        result: Completed | Failed | Released = _JOB_RESULT.validate_python(parsed(key, raw))
    except ValidationError as error:
        raise message_error(key, error) from None
    return result


# ---- feeder ----


class FeedError(Part):
    """Why the data cannot be used; `line` counts from 1."""

    reason: FailedReason
    message: Prose
    line: Annotated[int, Field(ge=1)] | None = None


class FeedRefusal(Part):
    """A line (or an answer of one) that is left out; `line` counts from 1 in `file`."""

    file: Annotated[str, Field(max_length=1024)] = ""
    line: Annotated[int, Field(ge=1)]
    reason: Annotated[str, Field(max_length=64)]
    message: Annotated[str, Field(max_length=512)] = ""


class FeedStatus(Message):
    """What the feeder knows of the data. `finished`: the last shard is in the stream.

    `digest` is that of tokenizer and chat template, which the agent compares with its own; `rendering` that of what
    else decides how a row becomes tokens, and `content` that of the lines, which a feeder that comes back compares.
    `sequences` and `tokens` are of one time through the samples to train on. `skipped_lines` cannot be used,
    `skipped_turns` are answers of lines that otherwise can; `skipped` counts both by reason, `refusals` are the first.
    `unknown_fields`: rows that have a field which means nothing here. `notes` are sentences for the user. `windowed`:
    held-out shards may be deleted once they are read; a feeder of the version before cannot push them again.
    """

    total_steps: Count = 0
    samples: Count = 0
    eval_samples: Count = 0
    eval_shards: Count = 0
    sequences: Count = 0
    tokens: Count = 0
    skipped_lines: Count = 0
    skipped_turns: Count = 0
    skipped: Annotated[dict[str, Count], Field(max_length=32)] = Field(default_factory=dict)
    refusals: Annotated[tuple[FeedRefusal, ...], Field(max_length=10)] = ()
    unknown_fields: Annotated[dict[str, Count], Field(max_length=64)] = Field(default_factory=dict)
    notes: Annotated[tuple[Prose, ...], Field(max_length=16)] = ()
    digest: Sha256 | None = None
    rendering: Sha256 | None = None
    content: Sha256 | None = None
    windowed: bool = False
    finished: bool = False
    error: FeedError | None = None
