"""What a FinetuneJob's status tells."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from coserve_api.common import MAX_VARIABLES_BYTES, Elapsed, Measured, StatusModel, Timestamp
from coserve_api.conditions import Condition

MAX_EVALUATIONS = 10
"""That a status tells of; the others are in evaluations.jsonl of the adapter's folder."""


class FailedReason(StrEnum):
    """Why a job ended without an adapter; each is final."""

    DATASET_NOT_FOUND = "DatasetNotFound"
    INVALID_DATASET = "InvalidDataset"
    INVALID_ADAPTER = "InvalidAdapter"
    INVALID_CHECKPOINT = "InvalidCheckpoint"
    ENDPOINT_REJECTED = "EndpointRejected"
    RANK_TOO_LARGE = "RankTooLarge"
    TRAINING_DIVERGED = "TrainingDiverged"
    BACKOFF_LIMIT_EXCEEDED = "BackoffLimitExceeded"
    ARTIFACT_STORE_ERROR = "ArtifactStoreError"
    INTERNAL_ERROR = "InternalError"
    DEADLINE_EXCEEDED = "DeadlineExceeded"


class PendingReason(StrEnum):
    """What a job waits for."""

    ENDPOINT_NOT_FOUND = "EndpointNotFound"
    ENDPOINT_REJECTED = "EndpointRejected"
    RANK_TOO_LARGE = "RankTooLarge"
    NAME_TAKEN = "NameTaken"
    DATASET_NOT_ALLOWED = "DatasetNotAllowed"
    TOO_MANY_ADAPTERS = "TooManyAdapters"
    ADAPTER_NOT_FOUND = "AdapterNotFound"
    CHECKPOINT_NOT_FOUND = "CheckpointNotFound"
    NO_CAPACITY = "NoCapacity"
    WAITING_FOR_DATA = "WaitingForData"
    FINETUNING_DISABLED = "FinetuningDisabled"
    BACKING_OFF = "BackingOff"
    REDIS_UNAVAILABLE = "RedisUnavailable"


class JobState(StrEnum):
    """For display; the conditions are what to build on."""

    PENDING = "Pending"
    RUNNING = "Running"
    SUSPENDED = "Suspended"
    COMPLETE = "Complete"
    FAILED = "Failed"


class JobCondition(StrEnum):
    ACCEPTED = "Accepted"
    """False where this version of the operator cannot read the object."""
    DATA_READY = "DataReady"
    BOUND = "Bound"
    RUNNING = "Running"
    SUSPENDED = "Suspended"
    PUBLISHED = "Published"
    COMPLETE = "Complete"
    FAILED = "Failed"
    FINISHED = "Finished"
    """Complete or Failed."""
    RECONCILING = "Reconciling"
    STALLED = "Stalled"
    """These two are kstatus's: True only while something is under way, or cannot go on."""


class EvaluationStatus(StatusModel):
    """One evaluation."""

    step: Annotated[int, Field(ge=0)]
    """After how many optimizer steps."""
    loss: Measured | None = None
    """Mean loss over the held-out samples; absent where it was not finite."""


class Progress(StatusModel):
    """How far the training is."""

    step: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps done."""
    total_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps in all."""
    percent: Annotated[int, Field(ge=0, le=100)] = 0
    """Steps done, in percent."""
    tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens trained on."""
    loss: Measured | None = None
    """Training loss of the last step."""
    eval_loss_initial: Measured | None = None
    """Evaluation loss before the first step."""
    eval_loss: Measured | None = None
    """Evaluation loss, last measured."""
    best_step: Annotated[int, Field(ge=0)] | None = None
    """After how many optimizer steps the evaluation loss was lowest; what publish.policy Best publishes."""
    best_eval_loss: Measured | None = None
    """The lowest evaluation loss."""
    evaluations: (
        Annotated[
            tuple[EvaluationStatus, ...],
            Field(max_length=MAX_EVALUATIONS, json_schema_extra={"x-kubernetes-list-type": "atomic"}),
        ]
        | None
    ) = None
    """The last evaluations, oldest first."""
    tokens_per_second: Annotated[int, Field(ge=0)] | None = None
    """Training speed."""
    eta: Elapsed | None = None
    """Time left, estimated from the training speed, such as 2m12s."""


class SkippedLine(StatusModel):
    """A line, or an answer of one, that could not be used."""

    file: Annotated[str, Field(max_length=1024)] = ""
    """Its file in the feeder's pod."""
    line: Annotated[int, Field(ge=1)]
    """Its number there, from 1."""
    reason: Annotated[str, Field(max_length=64)]
    """Why, in one word."""
    message: Annotated[str, Field(max_length=512)] = ""
    """Why, and what to change."""


class ReasonCount(StatusModel):
    """How many lines could not be used for one reason."""

    reason: Annotated[str, Field(max_length=64)]
    """The reason."""
    count: Annotated[int, Field(ge=0)]
    """Lines, and answers that were refused alone."""


class FieldCount(StatusModel):
    """How many rows have a field that means nothing here."""

    name: Annotated[str, Field(max_length=64)]
    """The field."""
    count: Annotated[int, Field(ge=0)]
    """Rows that have it."""


class DatasetStatus(StatusModel):
    """What was found in the data set."""

    samples: Annotated[int, Field(ge=0)] = 0
    """Lines to train on."""
    eval_samples: Annotated[int, Field(ge=0)] = 0
    """Lines that are held out."""
    sequences: Annotated[int, Field(ge=0)] = 0
    """Sequences that the lines to train on give: more than lines where the chat template does not let one serve all
    answers of a conversation.
    """
    tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens of these, which is what one time through the data costs."""
    skipped_lines: Annotated[int, Field(ge=0)] = 0
    """Lines that cannot be used."""
    skipped_turns: Annotated[int, Field(ge=0)] = 0
    """Answers that cannot be used, of lines of which others can."""
    skipped_by_reason: Annotated[
        tuple[ReasonCount, ...],
        Field(
            max_length=32, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["reason"]}
        ),
    ] = ()
    """Why, by count."""
    first_skipped: Annotated[
        tuple[SkippedLine, ...], Field(max_length=10, json_schema_extra={"x-kubernetes-list-type": "atomic"})
    ] = ()
    """The first ten of them."""
    unknown_fields: Annotated[
        tuple[FieldCount, ...],
        Field(
            max_length=64, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}
        ),
    ] = ()
    """Fields of rows that mean nothing here."""


class BindingStatus(StatusModel):
    """The agent that has the right to run the job."""

    agent: Annotated[str, Field(max_length=253)]
    """Its pod; empty while the job is bound to none."""
    node: Annotated[str, Field(max_length=253)] = ""
    """Its node."""
    epoch: Annotated[int, Field(ge=0)]
    """Grows with each binding; writes of an older epoch are refused."""


class CheckpointStatus(StatusModel):
    """The last accepted checkpoint: enough, without Redis, to go on."""

    step: Annotated[int, Field(ge=0)]
    """Optimizer steps it covers."""
    cursor: Annotated[int, Field(ge=0)]
    """The last shard of the data that it covers."""
    epoch: Annotated[int, Field(ge=0)]
    """The binding under which it was written."""
    uri: Annotated[str, Field(max_length=1600)]
    """Its folder."""
    sha256: Annotated[str, Field(max_length=64)]
    """Checksum of its manifest.json."""


class PublishedAdapter(StatusModel):
    """The published version."""

    name: Annotated[str, Field(max_length=63)]
    """What clients give as `model`."""
    version: Annotated[int, Field(ge=1)]
    """Its number."""
    uri: Annotated[str, Field(max_length=1600)]
    """Its PEFT folder."""
    sha256: Annotated[str, Field(max_length=64)]
    """Checksum of its manifest.json."""
    rank: Annotated[int, Field(ge=1)] | None = None
    """Rows of A."""


class ContinuedFrom(StatusModel):
    """The adapter or the checkpoint that the job began with, as it was chosen at the first binding."""

    uri: Annotated[str, Field(max_length=1600)]
    """Its folder."""
    version: Annotated[int, Field(ge=1)] | None = None
    """The adapter's number, where it was published here."""
    sha256: Annotated[str, Field(max_length=64)] | None = None
    """Checksum of its manifest.json; not of a PEFT folder that is named by its URI."""


class BackoffStatus(StatusModel):
    """Attempts that ended by a fault since the last checkpoint; a later one ends it, and so does suspending the job."""

    attempts: Annotated[int, Field(ge=1)]
    """How many; each waits longer before the next."""
    failures: Annotated[int, Field(ge=0)] = 0
    """Of these, what backoffLimit counts."""
    step: Annotated[int, Field(ge=0)] = 0
    """The step of the last checkpoint."""
    reason: Annotated[str, Field(min_length=1, max_length=64)]
    """Of the last fault, in one word."""
    message: Annotated[str, Field(max_length=1024)] = ""
    """The last fault, and what to do about it."""
    until: Timestamp
    """When the next attempt may begin."""


class JobStatus(StatusModel):
    """How the job is."""

    state: JobState | None = None
    """For display; the conditions are what to build on."""
    reason: Annotated[str, Field(max_length=64)] | None = None
    """Why it is in this state."""
    progress: Progress | None = None
    """How far the training is."""
    dataset: DatasetStatus | None = None
    """What was found in the data set."""
    binding: BindingStatus | None = None
    """The agent that runs it."""
    checkpoint: CheckpointStatus | None = None
    """The last accepted checkpoint."""
    adapter: PublishedAdapter | None = None
    """The published version."""
    continued_from: ContinuedFrom | None = None
    """What the job began with, where adapter.from or resumeFrom names it."""
    endpoint_template_variables: Annotated[str, Field(max_length=MAX_VARIABLES_BYTES)] | None = None
    """The endpoint's engine.templateVariables when the job's data were first read, as JSON. The job keeps them,
    whatever becomes of the endpoint's; its own dataset.templateVariables come before them.
    """
    restarts: Annotated[int, Field(ge=0)] = 0
    """Rebindings after a lost agent, in all."""
    backoff: BackoffStatus | None = None
    """Faults since the last checkpoint, and when the job is tried again."""
    observed_generation: Annotated[int, Field(ge=0)] = 0
    """The metadata.generation this status is based on."""
    start_time: Timestamp | None = None
    """When the job was first bound; what decides the training is immutable from then on."""
    completion_time: Timestamp | None = None
    """When it was complete or failed."""
    conditions: Annotated[
        tuple[Condition, ...],
        Field(
            max_length=16, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
        ),
    ] = ()
    """Accepted, DataReady, Bound, Running, Suspended, Published, Complete, Failed, Finished, Reconciling, Stalled."""
