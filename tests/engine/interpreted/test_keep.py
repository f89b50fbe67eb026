"""What passes keep of a layer goes where their tables say, to the bit, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapters import DEVICE, randn

from coserve_engine.device.protocol import Columns
from coserve_engine.kernels.triton.keep import NAMES, KeptTables, keep
from coserve_engine.layout.batch import Window

ROWS, HEADS = 21, 3
WIDTHS = {"x": 48, "q": 48, "k": 16, "o": 48, "lse": HEADS, "x2": 48, "gate": 2080, "up": 2080}
LEAST = ("x", "o", "lse")


class Layout:
    """Of a pass, or of a batch."""

    def __init__(self, *, training: bool = True, windows: tuple[Window, ...] = ()) -> None:
        self.training, self.windows = training, windows


class Keeping:
    """A pass of two layers with room for 30 rows; the second keeps less."""

    def __init__(self, dtype: torch.dtype, *, training: bool = True) -> None:
        self.layout = Layout(training=training)
        layers = (NAMES, LEAST) if training else ()
        self.kept = tuple(
            {n: torch.full((30, WIDTHS[n]), -7.0, dtype=torch.float32 if n == "lse" else dtype) for n in names}
            for names in layers
        )


def values(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Rows as a layer leaves them: some are columns of wider ones."""
    qkv, both = randn(0, ROWS, 80, dtype=dtype), randn(1, ROWS, 4160, dtype=dtype)
    made = {"q": qkv[:, :48].view(ROWS, HEADS, 16), "k": qkv[:, 48:64].view(ROWS, 1, 16)}
    made |= {"gate": both[:, :2080], "up": both[:, 2080:], "lse": randn(2, ROWS, HEADS, dtype=torch.float32)}
    return made | {n: randn(3 + at, ROWS, 48, dtype=dtype) for at, n in enumerate(("x", "o", "x2"))}


def bound(tables: KeptTables, passes: dict[int, Any], *windows: Window) -> torch.Tensor:
    columns = Columns()
    put = tables.put(Layout(windows=windows), passes, DEVICE, columns)  # type: ignore[arg-type]
    return put(DEVICE.stage_columns(columns))


def expect(state: Keeping, layer: int, found: dict[str, torch.Tensor], first: int, start: int, stop: int) -> None:
    for name, store in state.kept[layer].items():
        assert torch.equal(store[first : first + stop - start], found[name].flatten(1)[start:stop])
        assert bool((torch.cat([store[:first], store[first + stop - start :]]) == -7.0).all())


def test_rows_of_windows_are_kept_by_their_own_pass(raced: Any, dtype: torch.dtype) -> None:
    passes, made = {n: Keeping(dtype, training=n < 2) for n in range(3)}, values(dtype)
    tables = KeptTables()
    at = bound(tables, passes, Window(0, 2, 11, 8), Window(2, 11, 13, 0), Window(1, 13, 20, 3))
    assert at.shape == (2, 4)

    def both() -> tuple[torch.Tensor, ...]:
        for layer in range(2):
            keep(layer, made, at)
        return tuple(store for n in range(2) for layer in passes[n].kept for store in layer.values())

    raced(both)
    for layer in range(2):
        expect(passes[0], layer, made, 8, 2, 11)
        expect(passes[1], layer, made, 3, 13, 20)


def test_another_pass_may_stand_in_the_windows_of_a_captured_launch(dtype: torch.dtype) -> None:
    """What is nobody's keeps nothing."""
    passes, tables, made = {n: Keeping(dtype) for n in range(2)}, KeptTables(), values(dtype)
    fixed = torch.zeros(3, 4, dtype=torch.int64)
    for n, window in enumerate((Window(0, 5, 9, 0), Window(1, 1, 3, 20))):
        fixed.zero_()
        fixed[:1] = bound(tables, passes, window)
        keep(0, made, fixed)
        expect(passes[n], 0, made, window.first, window.start, window.stop)


@pytest.mark.parametrize("wrong", ["table", "start", "first"])
def test_a_wrong_window_would_be_seen(dtype: torch.dtype, wrong: str) -> None:
    """The control."""
    passes, tables, made = {n: Keeping(dtype) for n in range(2)}, KeptTables(), values(dtype)
    at = bound(tables, passes, Window(0, 2, 11, 8), Window(1, 13, 20, 3))
    if wrong == "table":
        at[0, 0] = at[1, 0]
    else:
        at[0, {"start": 1, "first": 3}[wrong]] += 1
    keep(0, made, at)
    with pytest.raises(AssertionError):
        expect(passes[0], 0, made, 8, 2, 11)
