"""The start-up run teaches the latency model, leaves nothing behind, and says where bit-exactness does not hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from coserve_engine.work import ForwardWork, UnitWork


@pytest.mark.parametrize("finetuning", (True, False))
def test_calibration_leaves_nothing_behind(driver: Any, finetuning: bool) -> None:
    d = driver(jitter_s=0.002, finetuning=finetuning)
    ready = d.engine.ready()
    executor, cost = d.engine.executor, d.engine.cost
    assert executor.ledger.free_pages == executor.ledger.total == ready.kv_total_pages
    assert executor.passes == {}
    assert cost.forward_s(ForwardWork(decode=4, calls=4, kv_rows=256, pairs=4096)) > 0
    for head in (True, False):
        assert (cost.unit_bound_s(UnitWork(head, 64, 1, 4096)) > 0) == finetuning
    assert torch.isfinite(executor.cache.v).all()


def test_what_follows_is_not_changed_by_calibration(driver: Any, training: Any, start_job: Any) -> None:
    fresh, calibrated = driver(), driver()
    calibrated.engine.ready()
    for d in (fresh, calibrated):
        d.submit(start_job(), *training(steps=2))
        d.run()
    assert torch.equal(fresh.parameters(), calibrated.parameters())
