"""A finetuning job as counts: passes that open, go through forward and backward, and end an optimizer step together."""

from __future__ import annotations

from coserve_engine.scheduler.plan import Kind, PassShape, PassView, Segment, Unit
from coserve_engine.simulate.pool import PagePool

MAX_LIVE = 2


class Job:
    """An endless stream of like passes, `passes_per_step` of them in an optimizer step; two are live at most. A pass
    packs samples of `sample_tokens`.

    The next step's passes open once all of this step's are done, since they need its parameters.
    """

    def __init__(
        self, pool: PagePool, layers: int, tile: int, page: int, tokens: int, sample_tokens: int, passes_per_step: int
    ) -> None:
        self._pool, self._layers, self._per_step = pool, layers, passes_per_step
        samples = [min(sample_tokens, tokens - first) for first in range(0, tokens, sample_tokens)]
        tiles = tuple((min(tile, n - at), at + tile) for n in samples for at in range(0, n, tile))
        self._shape = PassShape(0, tiles, layers, training=True)
        self._pages = sum(-(-n // page) for n in samples)
        self._opened = 0
        self._units_of_pass = (layers + 1) * len(tiles)
        self.tokens = tokens
        self.passes: dict[int, PassView] = {}
        self.done = 0
        """Passes that came to their end."""

    def advance(self, *, may_open: bool) -> None:
        """Close what is done, open what may."""
        for number, view in list(self.passes.items()):
            if view.layer < 0:
                del self.passes[number]
                self._pool.give(self._pages)
                self.done += 1
        while may_open and len(self.passes) < MAX_LIVE and self._next_step() == self.done // self._per_step:
            if self._pool.reserve(self._pages):
                return
            shape = self._shape.like(self._opened)
            self.passes[self._opened] = PassView(shape, 0, self._layers, len(shape.tiles))
            self._opened += 1

    def _next_step(self) -> int:
        return (self.done + len(self.passes)) // self._per_step

    def drop_youngest(self) -> bool:
        """Give a pass up for its pages; it starts again later."""
        if not self.passes:
            return False
        self.passes.popitem()
        self._pool.give(self._pages)
        return True

    def window(self, segment: Segment) -> None:
        """A forward window has run."""
        assert segment.kind is Kind.FINETUNE
        view = self.passes[segment.slot]
        self.passes[segment.slot] = view._replace(fwd_tile=view.shape.tiles_of(segment)[1])

    def backward(self, unit: Unit) -> None:
        """A unit has run."""
        view = self.passes[unit.pass_id]
        if (unit.layer, unit.end) != (view.layer, view.end_tile) or not view.forward_done:
            raise ValueError(f"{unit} does not go on from {view}")
        layer, end = (unit.layer, unit.first) if unit.first else (unit.layer - 1, len(self._shape.tiles))
        self.passes[unit.pass_id] = PassView(view.shape, view.fwd_tile, layer, end)

    @property
    def held_pages(self) -> int:
        """Pages of its live passes."""
        return self._pages * len(self.passes)

    @property
    def progress_tokens(self) -> float:
        """Tokens trained: those of finished passes, and of live ones by the share of their work (forward: a third)."""
        tiles = len(self._shape.tiles)
        part = 0.0
        for view in self.passes.values():
            backward = (self._layers - view.layer) * tiles + tiles - view.end_tile
            part += view.fwd_tile / tiles / 3 + 2 * backward / self._units_of_pass / 3
        return self.tokens * (self.done + part)
