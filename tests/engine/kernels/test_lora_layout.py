"""One flat buffer holds every A and B once; ranks are stored in eights, and the padding stays zero in training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from coserve_engine.config import LINEARS
from coserve_engine.formats.model_folder import read_model_config
from coserve_engine.messages import LoraSpec
from coserve_engine.tensors.lora import LoraLayout


@pytest.mark.parametrize(("rank", "stored"), [(1, 8), (4, 8), (5, 8), (8, 8), (9, 16), (16, 16)])
@pytest.mark.parametrize("targets", (LINEARS, ("v_proj", "q_proj")), ids=("all", "two"))
def test_views_cover_the_buffer_once(plain: str, rank: int, stored: int, targets: tuple[str, ...]) -> None:
    config = read_model_config(Path(plain))
    layout = LoraLayout(config, LoraSpec(rank, 8.0, targets))
    flat = torch.zeros(layout.size)
    for layer in layout.views(flat):
        assert list(layer) == [name for name in LINEARS if name in targets]
        for name, (a, b) in layer.items():
            out, into = config.linear_shape(name)
            assert (a.shape, b.shape) == ((stored, into), (out, stored))
            a.add_(1)
            b.add_(1)
    assert torch.equal(flat, torch.ones(layout.size))


def test_fresh_parameters_are_pefts(plain: str) -> None:
    """A uniform within 1 / sqrt(in), B zero; the seed names them."""
    config = read_model_config(Path(plain))
    layout = LoraLayout(config, LoraSpec(6, 8.0, LINEARS))
    cpu = torch.device("cpu")
    flat = layout.fresh(1, torch.float32, cpu)
    assert torch.equal(flat, layout.fresh(1, torch.float32, cpu))
    assert not torch.equal(flat, layout.fresh(2, torch.float32, cpu))
    for layer in layout.views(flat):
        for a, b in layer.values():
            bound = 1 / math.sqrt(a.shape[1])
            assert 0.9 * bound < a[:6].abs().max() <= bound
            assert abs(float(a[:6].mean())) < 0.15 * bound
            assert not a[6:].any()
            assert not b.any()


def test_padding_of_the_rank_stays_zero(driver: Any, training: Any, start_job: Any) -> None:
    d = driver()
    d.submit(start_job(rank=6))
    before = d.run().engine.jobs["job"].weights.layers
    d.submit(*training(steps=4))
    d.run()
    for layer in before:
        for a, b, *_ in layer.values():
            assert b[:, :6].all(), "it was trained"
            assert not a[6:].any()
            assert not b[:, 6:].any()
