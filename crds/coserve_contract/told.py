"""What an agent and a feeder are told of a job's spec, wherever the job comes from."""

from __future__ import annotations

import json
from typing import Any

from coserve_api.job import DEFAULT_ALPHA, DEFAULT_RANK, JobSpec, RsloraPolicy, TargetModule
from coserve_contract.messages import BindingSpec, Start

DAY_CHARS = len("2026-07-26")


def binding_spec(
    spec: JobSpec,
    *,
    job_uid: str,
    job_name: str,
    namespace: str,
    adapter_number: int,
    start: Start | None,
    template_variables: dict[str, Any],
    max_slowdown_percent: int | None,
) -> BindingSpec:
    """What an agent needs of `spec`; it begins with `start`, or anew."""
    new = start is None
    return BindingSpec(
        job_uid=job_uid,
        job_name=job_name,
        namespace=namespace,
        adapter_name=spec.adapter.name,
        adapter_number=adapter_number,
        rank=(spec.adapter.rank or DEFAULT_RANK) if new else None,
        alpha=(spec.adapter.alpha or DEFAULT_ALPHA) if new else None,
        target_modules=(spec.adapter.target_modules or tuple(TargetModule)) if new else None,
        learning_rate=float(spec.training.learning_rate),
        schedule=spec.training.schedule,
        warmup_steps=spec.training.warmup_steps,
        batch_size=spec.training.batch_size,
        weight_decay=float(spec.training.weight_decay),
        max_grad_norm=float(spec.training.max_grad_norm),
        seed=spec.training.seed,
        checkpoint_every_steps=spec.checkpoint.every_steps,
        checkpoint_keep=spec.checkpoint.keep,
        publish=spec.publish.policy,
        dropout=float(spec.adapter.dropout),
        use_rslora=spec.adapter.use_rslora is RsloraPolicy.ENABLED,
        adam_beta1=float(spec.training.adam_beta1),
        adam_beta2=float(spec.training.adam_beta2),
        adam_epsilon=float(spec.training.adam_epsilon),
        eval_every_steps=spec.evaluation.every_steps,
        patience=spec.evaluation.patience,
        start=start,
        priority=spec.priority,
        template_variables=template_variables,
        max_slowdown_percent=max_slowdown_percent,
    )


def start_at(spec: JobSpec, path: str, sha256: str | None) -> Start:
    """The folder that a job goes on from, and what the job says of its shape."""
    adapter = spec.adapter
    return Start(
        path=path,
        sha256=sha256,
        rank=adapter.rank,
        alpha=adapter.alpha,
        target_modules=adapter.target_modules,
        use_rslora=None if adapter.use_rslora is None else adapter.use_rslora is RsloraPolicy.ENABLED,
    )


def feeder_settings(
    spec: JobSpec, *, created: str, max_model_length: int, template_variables: dict[str, Any]
) -> dict[str, str | int]:
    """A feeder's settings, but for whose job it is and where the files lie. `created` is when the job was made."""
    dataset, training = spec.dataset, spec.training
    settings: dict[str, str | int] = {
        "FORMAT": dataset.format.value,
        "LEARN": dataset.learn.value,
        "EVAL_PERCENT": spec.eval_percent,
        "MAX_SEQUENCE_LENGTH": dataset.max_sequence_length or max_model_length,
        "ON_INVALID": dataset.on_invalid.value,
        "TEMPLATE_VARIABLES": json.dumps(template_variables, sort_keys=True),
        "DATE": dataset.date or created[:DAY_CHARS],
        "BATCH_SIZE": training.batch_size,
        "WARMUP_STEPS": training.warmup_steps,
        "SEED": training.seed,
    }
    if training.epochs is not None:
        settings["EPOCHS"] = training.epochs
    elif training.max_steps is not None:
        settings["MAX_STEPS"] = training.max_steps
    # Only where it is set: what an older operator did not know must not make its feeders anew.
    if spec.evaluation.max_samples is not None:
        settings["EVAL_MAX_SAMPLES"] = spec.evaluation.max_samples
    return settings
