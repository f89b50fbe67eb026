"""What an operator binds: a small job."""

from __future__ import annotations

from typing import Any

from coserve_api.job import PublishPolicy, Schedule, TargetModule
from coserve_contract.messages import BindingSpec


def binding_spec(job: str, **changes: Any) -> BindingSpec:
    values: dict[str, Any] = {
        "job_uid": job,
        "job_name": f"name-of-{job}",
        "namespace": "default",
        "adapter_name": "tuned",
        "adapter_number": 1,
        "rank": 4,
        "alpha": 8,
        "target_modules": tuple(TargetModule),
        "learning_rate": 5e-3,
        "schedule": Schedule.COSINE,
        "warmup_steps": 2,
        "batch_size": 4,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "seed": 3,
        "checkpoint_every_steps": 5,
        "checkpoint_keep": 2,
        "publish": PublishPolicy.ALWAYS,
    }
    return BindingSpec(**values | changes)
