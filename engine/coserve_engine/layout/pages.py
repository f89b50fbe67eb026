"""Which pages attention reads of a sequence."""

from __future__ import annotations

from coserve_engine.numerics import Numerics
from coserve_engine.scheduler.pages import NULL_PAGE


def covering(pages: tuple[int, ...], end: int, numerics: Numerics) -> tuple[int, ...]:
    """The first of a sequence's `pages`, up to position `end`; null pages where it has none yet."""
    need, count = numerics.pages(end), len(pages)
    return pages[:need] if need < count else (*pages, *([NULL_PAGE] * (need - count)))


def write_places(pages: tuple[int, ...], start: int, stop: int, numerics: Numerics) -> list[int]:
    """Where positions [start, stop) of a sequence with these pages lie in the pool, counted in positions."""
    page = numerics.page
    return [pages[p // page] * page + p % page for p in range(start, stop)]
