"""FinetuneJob: train one LoRA adapter on an endpoint, beside its inference, and publish it there."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator
from pydantic.alias_generators import to_camel

from coserve_api.adapters import PUBLISHER
from coserve_api.common import (
    BatchSize,
    BetaDecimal,
    Day,
    DropoutDecimal,
    Epochs,
    EpsilonDecimal,
    EvalPercent,
    Label,
    NonNegativeDecimal,
    ObjectMeta,
    PositiveDecimal,
    Rank,
    Seed,
    SequenceLength,
    SpecModel,
    Steps,
    TemplateVariables,
    UnitDecimal,
)
from coserve_api.errors import InvalidValueError
from coserve_api.job_status import JobStatus
from coserve_api.resume import ResumeFrom
from coserve_api.uris import AdapterSource, DatasetUri

_STORED = "stored"
"""In the context of a validation: the API server took the object, maybe by older rules."""
DEFAULT_RANK, DEFAULT_ALPHA = 8, 16


FROZEN = ("endpointRef", "dataset", "adapter", "resumeFrom", "training", "evaluation")
"""Fields of a spec that decide the training: immutable once the job has started. The others may change at any time."""


MAX_SECONDS = 2**31 - 1


class DatasetFormat(StrEnum):
    AUTO = "auto"
    MESSAGES = "messages"
    PROMPT_COMPLETION = "prompt-completion"
    TEXT = "text"
    SHAREGPT = "sharegpt"
    ALPACA = "alpaca"


class Learn(StrEnum):
    """Which of a conversation's answers are learned."""

    ALL = "All"
    LAST = "Last"


class OnInvalid(StrEnum):
    FAIL = "Fail"
    SKIP = "Skip"


class Schedule(StrEnum):
    LINEAR = "linear"
    COSINE = "cosine"
    CONSTANT = "constant"


class PublishPolicy(StrEnum):
    ALWAYS = "Always"
    IF_EVAL_IMPROVES = "IfEvalImproves"
    BEST = "Best"
    NEVER = "Never"


class RsloraPolicy(StrEnum):
    ENABLED = "Enabled"
    DISABLED = "Disabled"


class TargetModule(StrEnum):
    """The linears that can carry an adapter, by their names in Hugging Face's models."""

    Q = "q_proj"
    K = "k_proj"
    V = "v_proj"
    O = "o_proj"  # noqa: E741
    GATE = "gate_proj"
    UP = "up_proj"
    DOWN = "down_proj"


class EndpointRef(SpecModel):
    """The endpoint, in the job's namespace."""

    name: Label
    """Its name."""


class Dataset(SpecModel):
    """What to learn from: files of JSON Lines (plain or gzip) or Parquet."""

    uri: DatasetUri
    """pvc://CLAIM/PATH, or file:///data/PATH in the pod: a file, a folder, or a pattern with * and ?."""
    format: DatasetFormat = DatasetFormat.AUTO
    """Kind of row: messages, sharegpt, prompt-completion, alpaca or text; auto looks at the first."""
    learn: Learn = Learn.ALL
    """Whether All answers of a conversation are learned or only the Last."""
    eval_percent: EvalPercent | None = None
    """Share of the samples that is held out for the evaluation loss. Default: 5, and 0 with an evaluation.uri."""
    max_sequence_length: SequenceLength | None = None
    """A sample with more tokens cannot be used. Default: the endpoint's maxModelLength."""
    on_invalid: OnInvalid = OnInvalid.FAIL
    """Whether a line, or an answer of it, that cannot be used fails the job or is skipped and counted."""
    template_variables: TemplateVariables = Field(default_factory=dict)
    """Variables of the chat template by name, such as enable_thinking. They go with the adapter: it is served with
    them, where a request does not say otherwise. At most 16 KiB of JSON, 32 deep, those of the endpoint included."""
    date: Day | None = None
    """What a chat template that asks for the date is told, such as 2026-07-26. Default: the day on which the job was
    made (UTC)."""


class Adapter(SpecModel):
    """The LoRA adapter to train, in PEFT's terms."""

    name: Label
    """What clients give as `model` once it is published."""
    source: AdapterSource | None = Field(None, alias="from")
    """The adapter whose weights training begins with, instead of random ones: a name that the endpoint has published,
    or the URI of a PEFT folder in the model's or the artifact store's volume. Rank, alpha, useRslora and targetModules
    are taken over from it; where they are set they must be the same.
    """
    rank: Rank | None = None
    """Rows of A; at most the endpoint's finetuning.maxRank. Default: 8."""
    alpha: Annotated[int, Field(ge=1, le=4096)] | None = None
    """The adapter's output is scaled by alpha / rank. Default: 16."""
    dropout: DropoutDecimal = "0"
    """Share of the adapter's inputs that is dropped in training, a decimal string."""
    use_rslora: RsloraPolicy | None = None
    """Enabled scales by alpha / sqrt(rank) instead (rank-stabilised LoRA). Default: Disabled."""
    target_modules: (
        Annotated[
            tuple[TargetModule, ...],
            Field(min_length=1, max_length=7, json_schema_extra={"x-kubernetes-list-type": "set"}),
        ]
        | None
    ) = None
    """The linears that carry it. Default: all seven."""


class Training(SpecModel):
    """The optimizer's settings, in the terms of Hugging Face's Trainer."""

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                {"rule": "has(self.epochs) != has(self.maxSteps)", "message": "set exactly one of epochs and maxSteps"},
                {
                    "rule": "!has(self.maxSteps) || self.warmupSteps < self.maxSteps",
                    "message": "warmupSteps must be below maxSteps",
                    "fieldPath": ".warmupSteps",
                },
            ]
        }
    )

    epochs: Epochs | None = None
    """Times through the data."""
    max_steps: Steps | None = None
    """Optimizer steps."""
    learning_rate: PositiveDecimal = "2e-4"
    """Peak learning rate, a decimal string."""
    schedule: Schedule = Schedule.LINEAR
    """How the learning rate falls after the warm-up: linear, cosine or constant."""
    warmup_steps: Annotated[int, Field(ge=0, le=10_000_000)] = 0
    """Steps over which the learning rate rises from 0."""
    batch_size: BatchSize = 8
    """Samples of an optimizer step."""
    weight_decay: UnitDecimal = "0"
    """AdamW's weight decay, a decimal string."""
    adam_beta1: BetaDecimal = "0.9"
    """AdamW's decay of the first moment, a decimal string."""
    adam_beta2: BetaDecimal = "0.999"
    """AdamW's decay of the second moment, a decimal string."""
    adam_epsilon: EpsilonDecimal = "1e-8"
    """AdamW's epsilon, a decimal string."""
    max_grad_norm: NonNegativeDecimal = "1.0"
    """The gradient is clipped to this norm; "0" clips never."""
    seed: Seed = 0
    """Of the initial weights, the order of the samples and the dropout."""

    @model_validator(mode="after")
    def _one_length(self, info: ValidationInfo) -> Training:
        if (self.epochs is None) == (self.max_steps is None):
            raise InvalidValueError("set exactly one of epochs and maxSteps")
        if self.max_steps is not None and self.warmup_steps >= self.max_steps:
            # Stored objects are older than the rule that forbids equality; the feeder tells whoever made one.
            stored = info.context is not None and info.context.get(_STORED)
            if not stored or self.warmup_steps > self.max_steps:
                raise InvalidValueError("warmupSteps must be below maxSteps")
        return self


class CheckpointPolicy(SpecModel):
    """How often the training state is saved."""

    every_steps: Annotated[int, Field(ge=1, le=1000)] = 20
    """Optimizer steps between checkpoints."""
    keep: Annotated[int, Field(ge=1, le=100)] = 2
    """Checkpoints that are kept."""


class Evaluation(SpecModel):
    """When the loss over the held-out samples is measured, besides before the first and after the last step."""

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                {
                    "rule": "!has(self.patience) || self.everySteps > 0",
                    "message": "patience counts evaluations: set everySteps to 1 or more",
                    "fieldPath": ".patience",
                },
            ]
        }
    )

    every_steps: Annotated[int, Field(ge=0, le=10_000_000)] = 0
    """Optimizer steps between evaluations; 0 for none in between."""
    max_samples: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """The most held-out samples that are evaluated, chosen by the seed. Default: all."""
    uri: DatasetUri | None = None
    """A file of held-out samples of its own, read as the data set is; nothing is held out of the data set then."""
    patience: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Training ends, complete, after so many evaluations in a row without a lower loss. Default: never early."""

    @model_validator(mode="after")
    def _evaluated_while_it_waits(self) -> Evaluation:
        if self.patience is not None and self.every_steps == 0:
            raise InvalidValueError("patience counts evaluations: set everySteps to 1 or more")
        return self


class Publish(SpecModel):
    """What happens with the trained adapter."""

    policy: PublishPolicy = PublishPolicy.ALWAYS
    """Always: every agent of the endpoint serves it under adapter.name. IfEvalImproves: only if the evaluation loss at
    the end is below the initial one. Best: the weights of the evaluation with the lowest loss (the earliest of equals),
    only if it is below the initial one. Never: it stays a checkpoint.
    """


_NEEDS_SAMPLES = (
    "publish.policy IfEvalImproves or Best and evaluation.patience need held-out samples: leave dataset.evalPercent "
    "out, set it above 0, or set evaluation.uri"
)
_HELD_OUT_TWICE = "evaluation.uri has the held-out samples: leave dataset.evalPercent out, or set it to 0"
_TWO_BEGINNINGS = "resumeFrom and adapter.from each say what training begins with: leave one of them out"
_BEST_OF_SOME = "publish.policy Best chooses among evaluations: set evaluation.everySteps to 1 or more"


class JobSpec(SpecModel):
    """What to train. What decides the training is immutable once the job has started."""

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                {
                    "rule": "has(self.evaluation.uri) || !has(self.dataset.evalPercent) || self.dataset.evalPercent > 0"
                    " || (!(self.publish.policy in ['IfEvalImproves', 'Best']) && !has(self.evaluation.patience))",
                    "message": _NEEDS_SAMPLES,
                    "fieldPath": ".dataset.evalPercent",
                },
                {
                    "rule": "!has(self.evaluation.uri) || !has(self.dataset.evalPercent)"
                    " || self.dataset.evalPercent == 0",
                    "message": _HELD_OUT_TWICE,
                    "fieldPath": ".dataset.evalPercent",
                },
                {
                    "rule": "!has(self.resumeFrom) || !has(self.adapter.from)",
                    "message": _TWO_BEGINNINGS,
                    "fieldPath": ".resumeFrom",
                },
                {
                    "rule": "self.publish.policy != 'Best' || self.evaluation.everySteps > 0",
                    "message": _BEST_OF_SOME,
                    "fieldPath": ".publish.policy",
                },
            ]
        }
    )

    endpoint_ref: EndpointRef
    """The endpoint to train on."""
    dataset: Dataset
    """What to learn from."""
    adapter: Adapter
    """The adapter to train."""
    resume_from: ResumeFrom | None = None
    """The checkpoint that the job goes on from as if it were its own; the shape of its adapter is taken over, and
    what is set of it must be the same. Default: the job begins anew."""
    training: Training
    """The optimizer's settings."""
    checkpoint: CheckpointPolicy = Field(default_factory=CheckpointPolicy)
    """How often the training state is saved."""
    evaluation: Evaluation = Field(default_factory=Evaluation)
    """When the evaluation loss is measured."""
    publish: Publish = Field(default_factory=Publish)
    """What happens with the trained adapter."""
    priority: Annotated[int, Field(ge=-4, le=4)] = 0
    """Share of the finetuning time among the jobs of an agent: each step up doubles it."""
    suspend: bool = False
    """Give the agent back after a checkpoint, and go on when false again."""
    backoff_limit: Annotated[int, Field(ge=0, le=1000)] = 6
    """Agents that a job may lose, or that may fail at it, in a row without a checkpoint in between, before it fails. A
    pod that was taken away (a drain, an eviction) and an artifact store that is away do not count.
    """
    active_deadline_seconds: Annotated[int, Field(ge=1, le=MAX_SECONDS)] | None = None
    """How long the job may go on after its start, or after it was last resumed, before it fails with DeadlineExceeded;
    the time in which it is suspended does not count. Default: for ever.
    """
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=MAX_SECONDS)] | None = None
    """How long after it is Complete or Failed the job is deleted; its adapter stays published. Default: never."""

    @property
    def eval_percent(self) -> int:
        """Share of the data set that is held out."""
        if self.dataset.eval_percent is not None:
            return self.dataset.eval_percent
        return 0 if self.evaluation.uri is not None else 5

    @model_validator(mode="after")
    def _evaluated_if_it_decides(self) -> JobSpec:
        policy, evaluation = self.publish.policy, self.evaluation
        decides = policy in (PublishPolicy.IF_EVAL_IMPROVES, PublishPolicy.BEST) or evaluation.patience is not None
        if decides and evaluation.uri is None and self.eval_percent == 0:
            raise InvalidValueError(_NEEDS_SAMPLES)
        if evaluation.uri is not None and self.eval_percent > 0:
            raise InvalidValueError(_HELD_OUT_TWICE)
        if self.resume_from is not None and self.adapter.source is not None:
            raise InvalidValueError(_TWO_BEGINNINGS)
        if policy is PublishPolicy.BEST and evaluation.every_steps == 0:
            raise InvalidValueError(_BEST_OF_SOME)
        return self


class FinetuneJob(BaseModel):
    """Train one LoRA adapter on an endpoint, beside its inference, and publish it there."""

    model_config = ConfigDict(extra="ignore", frozen=True, alias_generator=to_camel, populate_by_name=True)

    api_version: Literal["coserve.dev/v1alpha1"] = "coserve.dev/v1alpha1"
    kind: Literal["FinetuneJob"] = "FinetuneJob"
    metadata: ObjectMeta
    spec: JobSpec
    status: JobStatus = Field(default_factory=JobStatus)

    @property
    def publisher(self) -> str:
        """Who says to have created it; "" where nobody does."""
        return self.metadata.annotations.get(PUBLISHER, "")

    @classmethod
    def from_dict(cls, body: dict[str, Any]) -> FinetuneJob:
        """The object as the API server sent it; pydantic.ValidationError names each bad field."""
        return cls.model_validate(body, context={_STORED: True})
