"""What of another job's checkpoint must fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coserve_agent.errors import JobFailedError
from coserve_agent.jobs.resumed import check_resumed
from coserve_api.job import TargetModule
from coserve_api.job_status import FailedReason
from coserve_contract.messages import Start

LORA: dict[str, Any] = {"rank": 4, "alpha": 8.0, "targets": ["up_proj", "q_proj"], "dropout": 0.1, "use_rslora": False}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "state.json").write_text(json.dumps({"step": 10, "lora": LORA}))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/models/m/tiny"}))
    return tmp_path


def start(**shape: Any) -> Start:
    return Start(path="jobs/j/e1/s10", sha256="0" * 64, **shape)


def test_what_fits_and_what_is_not_said_is_taken(folder: Path) -> None:
    check_resumed(folder, start(), "/models/m/tiny", 10, 10)
    same = start(rank=4, alpha=8, use_rslora=False, target_modules=(TargetModule.Q, TargetModule.UP))
    check_resumed(folder, same, "/models/m/tiny", 10, 20)


@pytest.mark.parametrize(
    ("shape", "model", "total", "words"),
    [
        ({"rank": 8}, "/models/m/tiny", 10, "adapter.rank is 8, and the checkpoint's is 4"),
        ({"alpha": 16}, "/models/m/tiny", 10, "adapter.alpha is 16"),
        ({"use_rslora": True}, "/models/m/tiny", 10, "adapter.useRslora is True"),
        ({"target_modules": (TargetModule.Q,)}, "/models/m/tiny", 10, r"adapter.targetModules is \['q_proj'\]"),
        ({}, "/models/m/other", 10, "of the model /models/m/tiny, and the endpoint has /models/m/other"),
        ({}, "/models/m/tiny", 9, "has 10 steps, and the job's data and training give 9; raise training.maxSteps"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(folder: Path, shape: Any, model: str, total: int, words: str) -> None:
    with pytest.raises(JobFailedError, match=words) as caught:
        check_resumed(folder, start(**shape), model, 10, total)
    assert caught.value.reason is FailedReason.INVALID_CHECKPOINT
    assert str(caught.value).startswith("resumeFrom: ")


@pytest.mark.parametrize("text", ["", "[]", '{"lora": 3}', "{}"])
def test_what_does_not_read_is_refused(folder: Path, text: str) -> None:
    (folder / "state.json").write_text(text)
    with pytest.raises(JobFailedError, match="does not read as a checkpoint"):
        check_resumed(folder, start(), "/models/m/tiny", 10, 10)
