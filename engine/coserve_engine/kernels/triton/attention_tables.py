"""What attention's launches read of a layout: where calls and tiles lie, and in which pages, as ints of the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from coserve_engine.device.protocol import Columns, Staged
from coserve_engine.layout.batch import BatchLayout
from coserve_engine.layout.passes import PassLayout
from coserve_engine.numerics import Numerics


class CallTables(NamedTuple):
    """A batch's calls.

    Args:
        calls: [C, 5] int64, last first, so that those with most keys begin first: first row of the batch, rows, the
            first one's place in its tile, tiles up to the end of that, place of the first page in `pages`.
        pages: [P] int64.
    """

    calls: torch.Tensor
    pages: torch.Tensor


class PassTables(NamedTuple):
    """A pass's tiles.

    Args:
        tiles: [N, 6] int64: first row of the pass, the one behind its last, index in its sequence, place of the
            sequence's first page in `pages`, and of the sequence: the tile and the row behind its last.
        pages: [P] int64.
    """

    tiles: torch.Tensor
    pages: torch.Tensor


def put_calls(
    layout: BatchLayout, numerics: Numerics, columns: Columns, *, singles: bool = False
) -> Callable[[Staged], CallTables]:
    """The layout's `calls`, put among what will be staged, behind its `singles` if wanted. Calls of one sequence read
    one table, its longest.
    """
    pages: list[int] = []
    calls: list[tuple[int, ...]] = []
    known: tuple[int, ...] = ()
    place = 0
    for start, stop, first, tile_end, covered, _ in reversed((*(layout.singles if singles else ()), *layout.calls)):
        if known[: len(covered)] != covered:
            known, place = covered, len(pages)
            pages += covered
        calls.append((start, stop - start, first, tile_end // numerics.tile, place))
    rows = columns.ints(number for call in calls for number in call)
    at = columns.ints(pages)
    return lambda staged: CallTables(staged.ints[rows].view(-1, 5), staged.ints[at])


def put_pass(layout: PassLayout, columns: Columns) -> Callable[[Staged], PassTables]:
    """A pass's tiles and pages, put among what will be staged."""
    pages: list[int] = []
    places, ends, stops = [], [], []
    count = row = 0
    for seq, length in enumerate(layout.lengths):
        own = [n for n, span in enumerate(layout.spans) if span.seq == seq]
        count, row = count + len(own), row + length
        places.append(len(pages))
        ends.append(count)
        stops.append(row)
        pages += layout.pages[own[-1]]
    tiles = columns.ints(
        number
        for span in layout.spans
        for number in (span.start, span.stop, span.index, places[span.seq], ends[span.seq], stops[span.seq])
    )
    at = columns.ints(pages)
    return lambda staged: PassTables(staged.ints[tiles].view(-1, 6), staged.ints[at])
