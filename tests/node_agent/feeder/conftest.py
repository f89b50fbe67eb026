"""A data set of forty rows, and what a feeder is told about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from feeding import JOB, KEYS, prepared
from redis.asyncio import Redis

from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.data.material import Material
from coserve_contract.store import Store


@pytest.fixture
def store(redis: Redis) -> Store:
    return Store(redis, KEYS)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"one {n}", "completion": f" two {n}"} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def variables(redis_server: Any, data: Path, model_folder: Path) -> dict[str, object]:
    return {
        "redis_url": redis_server.url,
        "redis_password": redis_server.password,
        "endpoint_uid": KEYS.endpoint_uid,
        "job_uid": JOB,
        "job_name": "job",
        "dataset_path": data,
        "dataset_root": data.parent,
        "model_path": model_folder,
        "eval_percent": 10,
        "max_sequence_length": 64,
        "batch_size": 3,
        "epochs": 4,
        "seed": 1,
    }


@pytest.fixture
def material(variables: dict[str, object], tokenizer: Tokenizer) -> Material:
    return prepared(tokenizer, variables)
