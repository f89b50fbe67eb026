"""A forward of decode rows that was captured says what one that is computed says, whatever was replayed before it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_driver import Driver, late_driver
from stories import SETTINGS, TINY, orders, serve, story
from tables import plain_operators

from coserve_engine.device.fake import Recorded
from coserve_engine.kernels.graphs import PagedGraphs
from coserve_engine.kernels.protocol import Fixed
from coserve_engine.kernels.torch.table import TorchKernels
from coserve_engine.model import executor
from coserve_engine.model.graphs import buckets
from coserve_engine.model.sequences import SequenceRows
from coserve_engine.numerics import Numerics
from coserve_engine.scheduler.plan import Kind, Segment


class Capturing(TorchKernels):
    """Plain operators, whose forwards of decode rows are captured."""

    @property
    def graphs(self) -> PagedGraphs[Any]:
        return PagedGraphs(self.bind, self.numerics)


@pytest.fixture
def behind(plain: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Driver]:
    """A driver of an engine on plain operators behind a late device, captured or not."""

    def make(*, captured: bool, **settings: Any) -> Driver:
        def select(config: Any, numerics: Any, dtypes: Any, rope: Any, **how: bool) -> TorchKernels:
            return Capturing.create(config, numerics, dtypes, rope)

        with monkeypatch.context() as here:
            here.setattr(executor, "select", select if captured else plain_operators)
            driver = late_driver(plain, {**SETTINGS, **settings})
        driver.engine.executor.capture()
        return driver

    return make


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of steps that were replayed."""
    seen: list[int] = []
    real = Recorded.replay

    def spy(self: Recorded) -> None:
        seen.append(len(self.steps))
        real(self)

    monkeypatch.setattr(Recorded, "replay", spy)
    return seen


@pytest.mark.parametrize("settings", [{}, TINY], ids=["roomy", "tiny"])
@pytest.mark.parametrize("seed", range(2))
def test_it_says_what_one_that_is_computed_says(
    behind: Any, draw_tokens: Any, replays: list[int], seed: int, settings: dict[str, Any]
) -> None:
    """With as many rows as the moment has; some are put out, others take their pages."""
    asked = orders(draw_tokens, seed)
    expected = story(serve(behind(captured=False, **settings), asked, seed))
    assert replays == []
    found = serve(behind(captured=True, **settings), asked, seed)
    assert len(replays) > 30
    assert story(found) == expected


@pytest.mark.parametrize("stale", ["tokens", "positions", "write", "table"])
def test_what_is_not_put_in_anew_shows(
    behind: Any, draw_tokens: Any, monkeypatch: pytest.MonkeyPatch, stale: str
) -> None:
    """The control: of one of a graph's tensors, what the replay before found there."""
    asked = orders(draw_tokens, 0)
    expected = story(serve(behind(captured=False), asked, 0))
    fill = PagedGraphs.fill

    def partly(self: PagedGraphs[Any], into: Any, b: Any) -> None:
        kept = getattr(into, stale).clone()
        fill(self, into, b)
        getattr(into, stale).copy_(kept)

    monkeypatch.setattr(PagedGraphs, "fill", partly)
    assert story(serve(behind(captured=True), asked, 0)) != expected


def test_rows_that_are_nobodys_write_to_nobodys_page(behind: Any, draw_tokens: Any) -> None:
    e = serve(behind(captured=True), orders(draw_tokens, 3, count=3), 3).engine.executor
    page = e.numerics.page
    e.cache.k[:, :, :page] = 0.0
    before = e.cache.k.clone()
    e._decode(e.kernels.graphs.fixed(Fixed(rows=4, pages=3, adapters=0, rank=0), e.copies))
    assert torch.equal(e.cache.k[:, :, page:], before[:, :, page:])
    assert not torch.equal(e.cache.k, before)


@pytest.mark.parametrize("most", [1, 4, 5, 64, 250])
@pytest.mark.parametrize("multiple", [1, 4])
def test_every_number_of_rows_has_a_graph_that_is_not_much_larger(most: int, multiple: int) -> None:
    sizes = buckets(most, Numerics(row_multiple=multiple))
    for rows in range(1, most + 1):
        bucket = next(size for size in sizes if size >= rows)
        assert bucket % multiple == 0
        assert bucket <= 1.25 * rows + multiple
    assert len(sizes) < 30


@pytest.mark.parametrize("count", [300, pytest.param(20_000, marks=pytest.mark.nightly)])
def test_replays_do_not_drift(behind: Any, draw_tokens: Any, count: int) -> None:
    """Rows of some sequences, at any of their positions, again and again: at the end as at the start."""
    e, source = behind(captured=True).engine.executor, random.Random(0)
    tokens = [draw_tokens(n, 250) for n in range(6)]
    rows = {
        n: SequenceRows(t, e.ledger.reserve(f"request:{n}", e.numerics.pages(len(t)))) for n, t in enumerate(tokens)
    }
    for n in rows:
        e.forward((Segment(Kind.PREFILL, n, 0, 250, sample=True),), rows)

    def segments() -> tuple[Segment, ...]:
        chosen = sorted(source.sample(range(6), source.randint(1, 6)))
        return tuple(Segment(Kind.DECODE, n, source.randrange(250), 1, sample=True) for n in chosen)

    for step in range(count):
        layout, batch = e.bind(segments(), rows)
        assert e.graphs[0].find(layout, batch) is not None
        found = e.run(layout, batch, lambda layer: True).logits
        if step % 100 == 99:
            hidden = e.transformer.forward(batch, e.cache, lambda layer: True)
            expected = e._logits(e.kernels.sampled(batch, hidden))
            assert torch.allclose(found, expected[: found.shape[0]], rtol=1e-4, atol=1e-4)
