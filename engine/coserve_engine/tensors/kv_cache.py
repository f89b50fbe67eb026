"""Keys and values of all sequences, in pages of one pool."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch

from coserve_engine.config import ModelConfig
from coserve_engine.device.protocol import Columns, Staged
from coserve_engine.numerics import Numerics

Reader = Callable[[int], tuple[torch.Tensor, torch.Tensor]]
"""Layer -> a sequence's keys and values [1, KVH, L, D] there."""


@dataclass(frozen=True, slots=True)
class PageRun:
    """Pages of consecutive positions of a sequence: read in place where they are neighbours, else gathered."""

    first: int
    index: torch.Tensor | None
    """[n], or None where the pages are first, first + 1, ..."""

    @classmethod
    def put(cls, tables: Iterable[tuple[int, ...]], columns: Columns) -> Callable[[Staged], tuple[PageRun, ...]]:
        """Put pages of several sequences among what will be staged, where they are no neighbours; to be called with
        that.
        """
        runs = [_in_place(pages) or (pages[0], columns.ints(pages)) for pages in tables]
        return lambda staged: tuple(
            [run if isinstance(run, PageRun) else cls(run[0], staged.ints[run[1]]) for run in runs]
        )


@lru_cache(maxsize=4096)
def _in_place(pages: tuple[int, ...]) -> PageRun | None:
    """The run of pages that are neighbours; asked again in every iteration of a sequence."""
    first = pages[0]
    return PageRun(first, None) if all(page == first + i for i, page in enumerate(pages)) else None


class KVCache:
    """Paged keys and values: two pools [layers, KVH, pages * page, D]. Zeroed at first: masked tails must be finite."""

    def __init__(
        self, config: ModelConfig, pages: int, numerics: Numerics, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.layers, config.kv_heads, pages * numerics.page, config.head_size)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self._page = numerics.page

    @staticmethod
    def page_bytes(config: ModelConfig, numerics: Numerics, dtype: torch.dtype) -> int:
        """Bytes of one page, keys and values of all layers."""
        return 2 * config.layers * config.kv_heads * config.head_size * numerics.page * dtype.itemsize

    def write(self, layer: int, index: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store k, v [T, KVH, D] at flat positions `index` [T]."""
        self.k[layer].index_copy_(1, index, k.transpose(0, 1))
        self.v[layer].index_copy_(1, index, v.transpose(0, 1))

    def read(self, layer: int, run: PageRun, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [KVH, stop - start, D] of positions [start, stop) of the sequence with the pages `run`."""
        if run.index is None:
            base = run.first * self._page
            return self.k[layer][:, base + start : base + stop], self.v[layer][:, base + start : base + stop]
        return self._gather(layer, run.index[start // self._page :], start % self._page, stop - start)

    def reader(self, run: PageRun, start: int, stop: int) -> Reader:
        """`read` for one layer after another: what does not depend on the layer is looked up once."""
        if run.index is None:
            base = run.first * self._page
            k, v = (pool[:, None, :, base + start : base + stop].unbind() for pool in (self.k, self.v))
            return list(zip(k, v, strict=True)).__getitem__
        index = run.index[start // self._page :]

        def gathered(layer: int) -> tuple[torch.Tensor, torch.Tensor]:
            k, v = self._gather(layer, index, start % self._page, stop - start)
            return k[None], v[None]

        return gathered

    def _gather(self, layer: int, pages: torch.Tensor, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`count` positions of one layer's `pages` [n] from position `start` of the first."""

        def gather(pool: torch.Tensor) -> torch.Tensor:
            heads, _, size = pool.shape
            rows = pool.view(heads, -1, self._page * size).index_select(1, pages)
            return rows.view(heads, -1, size)[:, start : start + count]

        return gather(self.k[layer]), gather(self.v[layer])

    def scrub(self, pages: torch.Tensor) -> None:
        """Zero pages [n] that may hold values which are not finite: a masked key still meets 0 * value."""
        for pool in (self.k, self.v):
            layers, heads, _, size = pool.shape
            pool.view(layers, heads, -1, self._page, size).index_fill_(2, pages, 0.0)
