"""The whole engine on kernels says what it says on plain operators, decode captured; a device is late meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from engine_driver import late_driver
from tables import plain_operators, use_triton
from whole import SETTINGS, served

from coserve_engine.kernels.protocol import Fixed
from coserve_engine.kernels.triton import launch, lora, lora_tables
from coserve_engine.kernels.triton.lora_tables import LoraTables
from coserve_engine.kernels.triton.table import TritonKernels
from coserve_engine.model import executor
from coserve_engine.model.sequences import SequenceRows
from coserve_engine.scheduler.plan import Kind, Segment


def test_it_says_what_plain_operators_say(
    plain: str, random_adapter: Any, draw_tokens: Any, monkeypatch: pytest.MonkeyPatch, replays: list[int]
) -> None:
    monkeypatch.setattr(executor, "select", plain_operators)
    tokens, parameters = served(late_driver(plain, SETTINGS, jitter_s=1e-4), random_adapter, draw_tokens)
    use_triton(monkeypatch)
    d = late_driver(plain, SETTINGS, jitter_s=1e-4)
    assert isinstance(d.engine.executor.kernels, TritonKernels)
    assert d.engine.executor.capture() == 2
    found = served(d, random_adapter, draw_tokens)
    assert found[0] == tokens
    assert torch.allclose(found[1], parameters, atol=2e-4)
    without, adapted = sorted(set(replays))
    assert without < adapted
    assert replays.count(without) > 5
    assert replays.count(adapted) > 2
    assert d.engine.executor.copies.waits == 0


def test_a_batch_without_adapters_meets_no_launch_of_theirs(plain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_triton(monkeypatch)
    e = late_driver(plain, SETTINGS).engine.executor
    graphs, seen = e.kernels.graphs, []
    real = launch.run
    monkeypatch.setattr(launch, "run", lambda kernel, *rest: (seen.append(kernel), real(kernel, *rest)))
    for adapters in (0, 2):
        seen.clear()
        e._decode(graphs.fixed(Fixed(rows=4, pages=8, adapters=adapters, rank=8), e.copies))
        found = {lora.SHRINK, lora.EXPAND[lora_tables.FEW]} & set(seen)
        assert len(found) == adapters


@pytest.mark.parametrize(
    "stale", ["order", *(pytest.param(one, marks=pytest.mark.nightly) for one in ("entries", "blocks"))]
)
def test_adapters_that_are_not_put_in_anew_show(
    plain: str,
    random_adapter: Any,
    draw_tokens: Any,
    monkeypatch: pytest.MonkeyPatch,
    replays: list[int],
    stale: str,
) -> None:
    """The control: rows change their adapters from one replay to the next."""
    use_triton(monkeypatch)
    d = late_driver(plain, SETTINGS, jitter_s=1e-4)
    e = d.engine.executor
    weights = [random_adapter(e, 4 + 4 * n, n).weights for n in range(2)]
    tokens = [draw_tokens(n, 20) for n in range(3)]
    pages = [e.ledger.reserve(f"request:{n}", e.numerics.pages(21)) for n in range(3)]
    e.capture()

    def logits(adapters: Sequence[int | None]) -> torch.Tensor:
        rows = {
            n: SequenceRows(tokens[n], pages[n], None if of is None else weights[of]) for n, of in enumerate(adapters)
        }
        layout, batch = e.bind(tuple(Segment(Kind.DECODE, n, 19, 1, sample=True) for n in rows), rows)
        return e.run(layout, batch, lambda layer: True).logits

    cases: list[Sequence[int | None]] = [(0, 1, None), (1, None, 1), (None, 0, 0), (0, None, 0), (1, 1, 1)]
    graphs, e.graphs = e.graphs, ()
    expected = [logits(case) for case in cases]
    assert replays == []
    e.graphs = graphs
    for case, one in zip(cases, expected, strict=True):
        assert torch.allclose(logits(case), one, atol=1e-5)
    assert len(replays) == len(cases)
    fill = LoraTables.fill

    def partly(self: LoraTables, others: LoraTables | None) -> None:
        kept = getattr(self, stale).clone()
        fill(self, others)
        getattr(self, stale).copy_(kept)

    monkeypatch.setattr(LoraTables, "fill", partly)
    assert not all(torch.allclose(logits(case), one, atol=1e-5) for case, one in zip(cases, expected, strict=True))
