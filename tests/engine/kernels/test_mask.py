"""What a tile's mask and key range let a row see is exactly what the model defines, and no tile too many is read."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from coserve_engine.kernels.attention import Mask
from coserve_engine.numerics import Numerics

GROUP = 3


def create(tile: int, window: int | None) -> Mask:
    return Mask.create(Numerics(tile=tile), GROUP, 9 * tile, window, torch.float32, torch.device("cpu"))


def seen(mask: Mask, tile: int, index: int, row: int) -> list[int]:
    """Positions that row `row` of tile `index` sees, by the rules of `attend`; all heads of a group see the same."""
    end = (index + 1) * tile
    keys = torch.arange(mask.first_key(end), end)
    bias = mask.part(row, GROUP, len(keys))[0, 0]
    assert bias.shape == (GROUP, len(keys))
    assert torch.equal(bias, bias[:1].expand_as(bias))
    assert set(bias[0].tolist()) <= {0.0, float("-inf")}
    return [int(key) for key in keys[bias[0] == 0]]


tiles, windows, indices = st.integers(1, 20), st.none() | st.integers(1, 70), st.integers(0, 8)


@given(tile=tiles, window=windows, index=indices, data=st.data())
def test_a_row_sees_the_last_keys_up_to_its_own(tile: int, window: int | None, index: int, data: st.DataObject) -> None:
    row = data.draw(st.integers(0, tile - 1))
    position = index * tile + row
    first = 0 if window is None else max(0, position - window + 1)
    assert seen(create(tile, window), tile, index, row) == list(range(first, position + 1))


@given(tile=tiles, window=windows, index=indices)
def test_the_first_key_is_that_of_the_first_tile_seen(tile: int, window: int | None, index: int) -> None:
    start = create(tile, window).first_key((index + 1) * tile)
    assert start % tile == 0
    earliest = 0 if window is None else max(0, index * tile - window + 1)
    assert start <= earliest < start + tile


@given(tile=tiles, window=windows)
def test_padding_rows_see_something(tile: int, window: int | None) -> None:
    """A row without keys would be NaN."""
    mask = create(tile, window)
    rows = mask.part(tile - 1, GROUP + 1, tile)[0, 0]
    assert (rows == 0).any(1).all()
