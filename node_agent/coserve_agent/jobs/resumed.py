"""Whether another job's checkpoint fits a job that is to go on from it (`resumeFrom`)."""

from __future__ import annotations

import json
from pathlib import Path

from coserve_agent.errors import JobFailedError
from coserve_api.job_status import FailedReason
from coserve_contract.messages import Start
from coserve_engine.formats.adapter_config import ADAPTER_CONFIG
from coserve_engine.formats.opened import read_text

STATE = "state.json"


def check_resumed(folder: Path, start: Start, model_path: str, step: int, total_steps: int) -> None:
    """Check the checkpoint in `folder`, of `step` steps and whole, against what the job says of its shape.

    Raises:
        JobFailedError: it is of another model or another shape, or has more steps than the job will have.
    """
    try:
        lora = json.loads(read_text(folder, STATE))["lora"]
        model = json.loads(read_text(folder, ADAPTER_CONFIG))["base_model_name_or_path"]
        shape = {
            "rank": (start.rank, lora["rank"]),
            "alpha": (start.alpha, lora["alpha"]),
            "useRslora": (start.use_rslora, lora.get("use_rslora", False)),
            "targetModules": (start.target_modules and sorted(map(str, start.target_modules)), sorted(lora["targets"])),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unfit(f"{folder} does not read as a checkpoint ({error!r}); name another") from None
    if model != model_path:
        raise _unfit(f"the checkpoint is of the model {model}, and the endpoint has {model_path}; name another")
    for field, (wanted, found) in shape.items():
        if wanted is not None and wanted != found:
            remedy = "leave it out, which takes it over"
            raise _unfit(f"the job's adapter.{field} is {wanted}, and the checkpoint's is {found}; {remedy}")
    if step > total_steps:
        remedy = "raise training.maxSteps or epochs, or name an earlier checkpoint"
        raise _unfit(f"the checkpoint has {step} steps, and the job's data and training give {total_steps}; {remedy}")


def _unfit(what: str) -> JobFailedError:
    return JobFailedError(FailedReason.INVALID_CHECKPOINT, f"resumeFrom: {what}")
