"""Which rows of a pass meet the head is known without a look at a tensor."""

from __future__ import annotations

import random
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from coserve_engine.layout.passes import tile_spans, weighted_rows
from coserve_engine.numerics import Numerics


@given(st.lists(st.integers(1, 200), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_rows_that_meet_the_head(lengths: list[int], draw: random.Random) -> None:
    """Of each tile those that carry weight, in order, the last repeated up to the row multiple."""
    numerics = Numerics()
    spans = tile_spans(tuple(lengths), numerics)
    share = draw.choice((0.0, 0.1, 0.5, 1.0))
    weights = [draw.choice((0.5, -1.0, 1e-60)) if draw.random() < share else 0.0 for _ in range(spans[-1].stop)]
    rows, tiles = weighted_rows(spans, weights, numerics.row_multiple)
    assert len(tiles) == len(spans)
    for span, (first, stop, end) in zip(spans, tiles, strict=True):
        assert rows[first:stop] == [row for row in range(span.start, span.stop) if weights[row] != 0]
        assert (end - first) % numerics.row_multiple == 0
        assert end - stop < numerics.row_multiple
        assert rows[stop:end] == rows[stop - 1 : stop] * (end - stop)
    assert tiles[0].first == 0
    assert tiles[-1].end == len(rows)
    assert all(one.end == two.first for one, two in pairwise(tiles))
