"""The only place that reads the environment: variables with the prefix COSERVE_, checked once at start, which GPUs CUDA
shows, and what terminals say of themselves.

A value that an endpoint's or a job's author chooses has the custom resource's own type, so that nothing which the API
server took is refused here.
"""

from __future__ import annotations

import datetime
import os
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from coserve_agent import strict_json
from coserve_agent.errors import StartError
from coserve_api.common import (
    BatchSize,
    BatchTokens,
    ConcurrentJobs,
    Epochs,
    EvalPercent,
    Label,
    ModelLength,
    ModelName,
    Origin,
    Percentile,
    Rank,
    Requests,
    Seed,
    SequenceLength,
    SlowdownPercent,
    Steps,
    Subdomain,
    TemplateVariables,
    Threads,
    Uid,
)
from coserve_api.endpoint import (
    Device,
    Dtype,
    FinetuningPolicy,
    GenerationConfig,
    KernelFallback,
    NumericsMode,
    ToolCallParser,
)
from coserve_api.job import DatasetFormat, Learn, OnInvalid
from coserve_api.uris import DATA_ROOT, ModelUri

PREFIX = "COSERVE_"


def _variable(field: str) -> str:
    return PREFIX + field.upper()


def _blank_is_none(value: object) -> object:
    return None if value == "" else value


def _comma_separated(value: object) -> object:
    return tuple(filter(None, value.split(","))) if isinstance(value, str) else value


def _json(value: object) -> object:
    try:
        return strict_json.loads(value or "{}") if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it must be a JSON object ({error})") from None


OrBlank = BeforeValidator(_blank_is_none)
Port = Annotated[int, Field(ge=0, le=65535)]
Millis = Annotated[int, Field(ge=1)]
Bytes = Annotated[int, Field(ge=1)]


class _Settings(BaseSettings):
    # By their exact names: a variable of the template in other letters is not ours.
    model_config = SettingsConfigDict(
        alias_generator=_variable, populate_by_name=True, case_sensitive=True, extra="ignore", frozen=True
    )


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.absolute()


def _roots(value: object) -> object:
    return tuple(map(Path, filter(None, value.split(",")))) if isinstance(value, str) else value


class StoreSettings(_Settings):
    """Where the state of jobs is: in Redis, or in the directory STATE. The password comes from the endpoint's Secret,
    as does the CA (PEM) of a rediss:// one.
    """

    state: Annotated[Path | None, OrBlank, AfterValidator(_absolute)] = None
    redis_url: Annotated[str | None, OrBlank] = None
    redis_username: Annotated[str | None, OrBlank] = None
    redis_password: Annotated[SecretStr | None, OrBlank] = None
    redis_ca: str = ""

    @model_validator(mode="after")
    def _one_store(self) -> StoreSettings:
        if self.redis_url is not None and not re.match(r"(rediss?|unix)://.", self.redis_url):
            raise ValueError(f"REDIS_URL is {self.redis_url!r}; it must look like redis://HOST:PORT/0")
        if self.redis_url is not None and self.state is not None:
            raise ValueError(
                f"{PREFIX}STATE is {str(self.state)!r} and {PREFIX}REDIS_URL is set: the state of jobs is in a "
                "directory or in Redis; set one of them"
            )
        return self


class AgentSettings(StoreSettings):
    """An agent of one endpoint. With STATE it trains by itself, without Redis and Kubernetes, from data below
    DATA_ROOTS (none: from any path); with neither STATE nor REDIS_URL it serves only.

    Times in ms where not in seconds (_s), sizes in bytes, lengths in tokens; ports 0 are chosen by the kernel (tests).
    `adapter_bytes` is what all loaded adapters may take; `adapters` (name -> folder) are loaded at the start, others by
    requests from below `adapter_dir`, both only with STATE.
    From SIGTERM on new connections are accepted for `drain_s`, and requests and jobs are cut off after `shutdown_s`.
    """

    endpoint_uid: Uid = "local"
    endpoint_name: Label = "local"
    namespace: Label = "default"
    model_path: Path
    model_uri: Annotated[ModelUri | None, OrBlank] = None
    model_name: ModelName = "model"
    max_model_length: ModelLength = 1024
    ttft_ms: Millis = 1000
    tpot_ms: Millis = 200
    slo_percentile: Percentile = 99
    finetuning: FinetuningPolicy = FinetuningPolicy.ALLOWED
    max_rank: Rank = 64
    max_concurrent_jobs: ConcurrentJobs = 1
    max_slowdown_percent: Annotated[SlowdownPercent | None, OrBlank] = None
    pass_bytes: Annotated[Bytes | None, OrBlank] = None
    device: Device = Device.AUTO
    gpu_resource: str = ""
    dtype: Dtype = Dtype.AUTO
    numerics_mode: NumericsMode = NumericsMode.FAST
    kernel_fallback: KernelFallback = KernelFallback.FORBIDDEN
    visible_devices: str | None = Field(None, validation_alias="CUDA_VISIBLE_DEVICES")
    kernel_cache: Annotated[Path | None, OrBlank] = Field(None, validation_alias="TRITON_CACHE_DIR")
    image_kernels: Annotated[Path | None, OrBlank] = None
    max_requests: Annotated[Requests | None, OrBlank] = None
    max_batch_tokens: Annotated[BatchTokens | None, OrBlank] = None
    kv_cache_bytes: Annotated[Bytes | None, OrBlank] = None
    threads: Threads = 1
    generation_config: GenerationConfig = GenerationConfig.MODEL
    template_variables: Annotated[TemplateVariables, NoDecode, BeforeValidator(_json)] = Field(default_factory=dict)
    tool_call_parser: Annotated[ToolCallParser | None, OrBlank] = None
    cors_origins: Annotated[tuple[Origin, ...], NoDecode, BeforeValidator(_comma_separated)] = ()
    adapter_bytes: Annotated[Bytes | None, OrBlank] = None
    adapters: Annotated[dict[str, Path], NoDecode, BeforeValidator(_json)] = Field(default_factory=dict)
    adapter_dir: Annotated[Path | None, OrBlank, AfterValidator(_absolute)] = None
    artifacts: Path = Path("/artifacts")
    data_roots: Annotated[tuple[Path, ...], NoDecode, BeforeValidator(_roots)] = ()
    pod_name: Subdomain = "local"
    pod_uid: Uid = "local"
    node_name: str = ""
    host: str = "0.0.0.0"
    http_port: Port = 8000
    admin_port: Port = 8001
    max_waiting: int = Field(256, ge=1)
    max_body_bytes: int = Field(1 << 20, ge=1024)
    drain_s: float = Field(10.0, ge=0)
    shutdown_s: float = Field(40.0, ge=0)

    @property
    def artifact_store(self) -> Path:
        """Where checkpoints and adapters are."""
        return self.artifacts if self.state is None else self.state / "artifacts"

    @model_validator(mode="after")
    def _absolute_roots(self) -> AgentSettings:
        for root in self.data_roots:
            if not root.is_absolute():
                raise ValueError(f"{PREFIX}DATA_ROOTS has {str(root)!r}: name absolute folders, comma-separated")
        return self

    @model_validator(mode="after")
    def _drains_within_shutdown(self) -> AgentSettings:
        if self.drain_s > self.shutdown_s:
            raise ValueError(
                f"{PREFIX}DRAIN_S is {self.drain_s:g} and {PREFIX}SHUTDOWN_S {self.shutdown_s:g}, both counted from "
                "SIGTERM; make DRAIN_S the smaller one"
            )
        return self


class FeederMode(StrEnum):
    FEED = "Feed"
    CHECK = "Check"
    """Read the data, say what they are, and end."""


class FeederSettings(StoreSettings):
    """A feeder of one job: exactly one of EPOCHS and MAX_STEPS is set. DATASET_ROOT is the folder that no link in the
    data set may lead out of, EVAL_ROOT that of EVAL_PATH, the held-out samples' own; with them EVAL_PERCENT is 0.
    """

    mode: FeederMode = FeederMode.FEED
    endpoint_uid: Uid
    job_uid: Uid
    job_name: Subdomain
    dataset_path: Path
    dataset_root: Path = Path(DATA_ROOT)
    model_path: Path
    format: DatasetFormat = DatasetFormat.AUTO
    learn: Learn = Learn.ALL
    eval_percent: EvalPercent = 5
    eval_path: Annotated[Path | None, OrBlank] = None
    eval_root: Path = Path(DATA_ROOT)
    eval_max_samples: Annotated[int | None, Field(ge=1), OrBlank] = None
    max_sequence_length: SequenceLength = 1024
    on_invalid: OnInvalid = OnInvalid.FAIL
    batch_size: BatchSize = 8
    epochs: Annotated[Epochs | None, OrBlank] = None
    max_steps: Annotated[Steps | None, OrBlank] = None
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    seed: Seed = 0
    template_variables: Annotated[TemplateVariables, NoDecode, BeforeValidator(_json)] = Field(default_factory=dict)
    date: Annotated[datetime.date | None, OrBlank] = None

    @model_validator(mode="after")
    def _one_length(self) -> FeederSettings:
        if self.redis_url is None and self.state is None:
            raise ValueError(f"set {PREFIX}REDIS_URL, or {PREFIX}STATE, where the state of jobs is in a directory")
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError(f"set exactly one of {PREFIX}EPOCHS and {PREFIX}MAX_STEPS")
        if self.eval_path is not None and self.eval_percent:
            raise ValueError(f"{PREFIX}EVAL_PATH has the held-out samples: set {PREFIX}EVAL_PERCENT to 0")
        return self


def inherited() -> dict[str, str]:
    """The environment of a program that we start, but for its settings."""
    return {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}


class TerminalSettings(BaseSettings):
    """Of whoever looks at a tool's output: https://no-color.org, and a terminal that knows no colours."""

    model_config = SettingsConfigDict(extra="ignore", frozen=True)

    no_color: str = ""
    term: str = ""

    @property
    def colours(self) -> bool:
        return not self.no_color and self.term != "dumb"


S = TypeVar("S", bound=_Settings)


def read(kind: type[S]) -> S:
    """The settings of `kind` from the environment.

    Raises:
        StartError: one line for each wrong variable, with its name, its value and what is allowed.
    """
    try:
        return kind()
    except ValidationError as error:
        raise StartError("; ".join(_explain(kind, one) for one in error.errors())) from None


def _explain(kind: type[_Settings], error: object) -> str:
    assert isinstance(error, dict)
    field = str(error["loc"][0]) if error["loc"] else ""
    what = str(error["msg"]).removeprefix("Value error, ")
    if not field:
        return what
    variable = field if field.startswith(PREFIX) else _variable(field)
    if error["type"] == "missing":
        return f"{variable} is not set; {kind.__name__} needs it: set it in the pod's environment"
    shown = "***" if "PASSWORD" in variable else repr(error["input"])
    return f"{variable} is {shown}: {what[:1].lower()}{what[1:]}; correct the variable"
