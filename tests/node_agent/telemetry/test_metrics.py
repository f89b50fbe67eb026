"""The series of a job come with it and go with it."""

from __future__ import annotations

from prometheus_client import generate_latest

from coserve_agent.telemetry.metrics import Metrics
from coserve_engine.messages import EngineReady, PlainReason


def series(metrics: Metrics) -> str:
    return generate_latest(metrics.registry).decode()


def test_the_evaluation_loss_of_a_job() -> None:
    metrics = Metrics("base", lambda: 0.0)
    assert "coserve_job_eval_loss{" not in series(metrics)
    metrics.on_evaluation("mine", 2.5)
    metrics.on_evaluation("other", 1.5)
    metrics.on_step("mine", 3, 2.0, 100)
    assert 'coserve_job_eval_loss{job="mine"} 2.5' in series(metrics)
    metrics.on_evaluation("mine", None)
    assert 'coserve_job_eval_loss{job="mine"} NaN' in series(metrics), "no number is not an old number"
    metrics.forget_job("mine")
    metrics.forget_job("other")
    assert "job=" not in series(metrics)


def test_words_that_do_without_kernels_are_shown_by_reason() -> None:
    metrics = Metrics("base", lambda: 0.0)
    assert "coserve_kernel_fallbacks{" not in series(metrics), "no data is not zero"
    metrics.on_ready(EngineReady(128, 256, 10, 64, ()))
    assert [line[-3:] for line in series(metrics).splitlines() if line.startswith("coserve_kernel_fallbacks{")] == [
        "0.0" for _ in PlainReason
    ]
    metrics.on_ready(EngineReady(128, 256, 10, 64, (), plain_words=16, plain_reason=PlainReason.WIDTH))
    assert 'coserve_kernel_fallbacks{reason="width"} 16.0' in series(metrics)
    assert 'coserve_kernel_fallbacks{reason="triton"} 0.0' in series(metrics)
