"""Rows are padded by repeating the last one: lists and tensors alike."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from coserve_engine.kernels.functional import repeat_last_row
from coserve_engine.numerics import repeat_last


@given(count=st.integers(1, 20), multiple=st.integers(1, 8))
def test_the_last_row_is_repeated_up_to_the_next_multiple(count: int, multiple: int) -> None:
    values = list(range(count))
    padded = repeat_last(values, multiple)
    assert len(padded) % multiple == 0 and len(padded) - count < multiple
    assert padded[:count] == values and set(padded[count:]) <= {values[-1]}
    rows = torch.arange(count).unsqueeze(1).expand(count, 3)
    for tensor in (rows, rows[:, 0]):
        assert torch.equal(repeat_last_row(tensor, multiple), tensor[torch.tensor(padded)])


def test_nothing_stays_nothing() -> None:
    assert repeat_last([], 4) == []
    assert repeat_last_row(torch.empty(0, 3), 4).shape == (0, 3)
