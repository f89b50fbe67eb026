"""A job that goes on from an adapter, stopped and resumed: the bits of one that ran through, whatever became of the
folder that it began with.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from driver_rig import TOTAL, MakeRig, running

from coserve_agent.errors import JobFailedError
from coserve_api.job_status import FailedReason
from coserve_contract.messages import Start

WEIGHTS = "adapter_model.safetensors"
SHAPE: dict[str, Any] = {"rank": 3, "alpha": 5, "target_modules": ("q_proj", "up_proj")}
TAKEN: dict[str, Any] = {"rank": None, "alpha": None, "target_modules": None, "dropout": 0.1}


async def test_it_resumes_to_the_bit_without_the_folder_it_began_with(
    model_folder: Path, rig: MakeRig, tmp_path: Path
) -> None:
    options = TAKEN | {"start": Start(path="first", rank=3, target_modules=("up_proj", "q_proj"))}
    async with running(model_folder) as client:
        async with rig(client, **SHAPE) as first:
            await first.driver.train()
            await first.driver.export(tmp_path / "first")
        async with rig(client, **options) as whole:
            await whole.driver.train()
            await whole.driver.export(tmp_path / "whole")
        shutil.rmtree(tmp_path / "first")
        async with rig(client, resume=whole.path(3), **options) as resumed:
            assert (resumed.driver.rank, resumed.driver.state.step) == (3, 3)
            await resumed.driver.train()
            await resumed.driver.export(tmp_path / "parts")
        with pytest.raises(JobFailedError, match=r"first/adapter_config\.json: not readable") as caught:
            async with rig(client, **options):
                pass
    assert caught.value.reason is FailedReason.INVALID_ADAPTER
    assert whole.driver.state.eval_loss_initial == first.driver.state.eval_loss
    assert [record.step for record in resumed.steps] == list(range(4, TOTAL + 1))
    assert resumed.driver.state == whole.driver.state
    for name in (WEIGHTS, "adapter_config.json", "training_log.jsonl", "evaluations.jsonl"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
