"""What every job of an agent uses."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.engine.client import EngineClient
from coserve_agent.jobs.evaluations import EvalRecord
from coserve_agent.jobs.trainlog import StepRecord
from coserve_agent.model.base_model import base_model
from coserve_agent.settings import AgentSettings
from coserve_agent.telemetry.metrics import Metrics
from coserve_contract.protocols import JobFencing, JobStore

Observe = Callable[[str, StepRecord | EvalRecord], None]
"""Called with a job's uid after each step and each evaluation."""


@dataclass(frozen=True)
class Surroundings:
    """`pass_ids` are unique over the engine's life, `digest` is the tokenizer's, `base_model` is what an adapter's
    folder names as its base.
    """

    engine: EngineClient
    fencing: JobFencing
    store: JobStore
    metrics: Metrics
    artifacts: Path
    endpoint_uid: str
    model_path: str
    base_model: str
    digest: str
    max_model_length: int
    max_rank: int
    pass_ids: Iterator[int]
    now_s: Callable[[], float]
    observe: Observe


def surroundings(
    settings: AgentSettings,
    *,
    engine: EngineClient,
    fencing: JobFencing,
    store: JobStore,
    metrics: Metrics,
    tokenizer: Tokenizer,
    observe: Observe = lambda job, record: None,
) -> Surroundings:
    """Those of an agent's process."""
    return Surroundings(
        engine=engine,
        fencing=fencing,
        store=store,
        metrics=metrics,
        artifacts=settings.artifact_store,
        endpoint_uid=settings.endpoint_uid,
        model_path=str(settings.model_path),
        base_model=base_model(settings.model_path, settings.model_uri),
        digest=tokenizer.digest,
        max_model_length=settings.max_model_length,
        max_rank=settings.max_rank,
        pass_ids=itertools.count(1),
        now_s=time.monotonic,
        observe=observe,
    )
