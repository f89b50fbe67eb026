"""The only place that reads the environment: variables with the prefix COSERVE_, checked once at start."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from coserve_agent.errors import StartError
from coserve_api.endpoint import FinetuningPolicy
from coserve_api.job import DatasetFormat, OnInvalid

PREFIX = "COSERVE_"


def _name(value: object) -> object:
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,252}", value):
        raise ValueError("must be 1 to 253 letters, digits, '.', '_', ':' or '-', beginning with a letter or digit")
    return value


def _identity(value: object) -> object:
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z0-9-]{1,64}", value):
        raise ValueError("must be 1 to 64 letters, digits or '-', as Kubernetes' UIDs are")
    return value


def _blank_is_none(value: object) -> object:
    return None if value == "" else value


Name = Annotated[str, BeforeValidator(_name)]
Identity = Annotated[str, BeforeValidator(_identity)]
Port = Annotated[int, Field(ge=0, le=65535)]


class _Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore", frozen=True)


class RedisSettings(_Settings):
    """How to reach Redis; the password comes from the endpoint's Secret."""

    redis_url: Annotated[str | None, BeforeValidator(_blank_is_none)] = None
    redis_username: Annotated[str | None, BeforeValidator(_blank_is_none)] = None
    redis_password: Annotated[SecretStr | None, BeforeValidator(_blank_is_none)] = None

    @model_validator(mode="after")
    def _check_url(self) -> RedisSettings:
        if self.redis_url is not None and not re.match(r"(rediss?|unix)://.", self.redis_url):
            raise ValueError(f"REDIS_URL is {self.redis_url!r}; it must look like redis://HOST:PORT/0")
        return self


class AgentSettings(RedisSettings):
    """An agent of one endpoint. Without REDIS_URL it serves only.

    Times in ms where not in seconds (_s), sizes in bytes, lengths in tokens; ports 0 are chosen by the kernel (tests).
    From SIGTERM on new connections are accepted for `drain_s`, and requests and jobs are cut off after `shutdown_s`.
    """

    endpoint_uid: Identity = "local"
    endpoint_name: Name = "local"
    namespace: Name = "default"
    model_path: Path
    model_name: Name = "model"
    max_model_length: int = Field(1024, ge=1, le=1 << 20)
    ttft_ms: int = Field(1000, ge=1)
    tpot_ms: int = Field(200, ge=1)
    slo_percentile: int = Field(99, ge=50, le=100)
    finetuning: FinetuningPolicy = FinetuningPolicy.ALLOWED
    max_rank: int = Field(64, ge=1, le=1024)
    max_concurrent_jobs: int = Field(1, ge=1, le=64)
    max_slowdown_percent: Annotated[int | None, Field(ge=0), BeforeValidator(_blank_is_none)] = None
    pass_bytes: Annotated[int | None, Field(ge=1), BeforeValidator(_blank_is_none)] = None
    max_batch_tokens: int = Field(512, ge=128)
    kv_cache_bytes: int = Field(256 << 20, ge=1)
    threads: int = Field(1, ge=1, le=1024)
    artifacts: Path = Path("/artifacts")
    pod_name: Name = "local"
    pod_uid: Identity = "local"
    node_name: str = ""
    host: str = "0.0.0.0"
    http_port: Port = 8000
    admin_port: Port = 8001
    max_waiting: int = Field(256, ge=1)
    max_body_bytes: int = Field(1 << 20, ge=1024)
    drain_s: float = Field(10.0, ge=0)
    shutdown_s: float = Field(40.0, ge=0)

    @model_validator(mode="after")
    def _drains_within_shutdown(self) -> AgentSettings:
        if self.drain_s > self.shutdown_s:
            raise ValueError(
                f"{PREFIX}DRAIN_S is {self.drain_s:g} and {PREFIX}SHUTDOWN_S {self.shutdown_s:g}, both counted from "
                "SIGTERM; make DRAIN_S the smaller one"
            )
        return self


class FeederSettings(RedisSettings):
    """A feeder of one job: exactly one of EPOCHS and MAX_STEPS is set."""

    redis_url: str
    endpoint_uid: Identity
    job_uid: Identity
    job_name: Name
    dataset_path: Path
    model_path: Path
    format: DatasetFormat = DatasetFormat.AUTO
    eval_percent: int = Field(5, ge=0, le=50)
    max_sequence_length: int = Field(1024, ge=2)
    on_invalid: OnInvalid = OnInvalid.FAIL
    batch_size: int = Field(8, ge=1, le=4096)
    epochs: Annotated[int | None, Field(ge=1), BeforeValidator(_blank_is_none)] = None
    max_steps: Annotated[int | None, Field(ge=1), BeforeValidator(_blank_is_none)] = None
    seed: int = 0

    @model_validator(mode="after")
    def _one_length(self) -> FeederSettings:
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError(f"set exactly one of {PREFIX}EPOCHS and {PREFIX}MAX_STEPS")
        return self


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
    variable = PREFIX + field.upper()
    if error["type"] == "missing":
        return f"{variable} is not set; {kind.__name__} needs it: set it in the pod's environment"
    shown = "***" if "password" in field else repr(error["input"])
    return f"{variable} is {shown}: {what[:1].lower()}{what[1:]}; correct the variable"
