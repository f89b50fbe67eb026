"""A job's adapter as the engine takes it."""

from __future__ import annotations

from pathlib import Path

from coserve_api.job import TargetModule
from coserve_contract.messages import BindingSpec
from coserve_engine.messages import Continued, LoraSpec


def lora_of(spec: BindingSpec, start: Path | None) -> LoraSpec | Continued:
    """The adapter to train; `start` is the folder of the one to go on from, where `spec.start` is set."""
    if spec.start is not None:
        alpha, targets = spec.start.alpha, spec.start.target_modules
        return Continued(
            str(start),
            spec.dropout,
            spec.start.rank,
            None if alpha is None else float(alpha),
            None if targets is None else _names(targets),
            spec.start.use_rslora,
        )
    assert spec.rank is not None
    assert spec.alpha is not None
    assert spec.target_modules is not None
    return LoraSpec(spec.rank, float(spec.alpha), _names(spec.target_modules), spec.dropout, spec.use_rslora)


def _names(targets: tuple[TargetModule, ...]) -> tuple[str, ...]:
    return tuple(str(target) for target in targets)
