"""For which batches of decode rows beside others there are captured forwards, and how large these are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coserve_engine.device.cpu import CpuDevice
from coserve_engine.device.fake import FakeDevice
from coserve_engine.kernels.protocol import Fixed
from coserve_engine.model.mixed import LAYERS, TIMES, MixedForwards, mixed_sizes
from coserve_engine.numerics import Numerics
from coserve_engine.scheduler.plan import Kind, Segment


class Counted:
    """Batches that hold nothing: what is put into one is listed."""

    def __init__(self, room: int) -> None:
        self.room, self.filled = room, []

    def forms(self, size: Fixed) -> tuple[Fixed, ...]:
        return (size,)

    def fixed(self, size: Fixed, device: Any) -> Fixed:
        return size

    def holds(self, into: Fixed, b: int) -> bool:
        return b <= into.rows - into.others and b <= self.room

    def fill(self, into: Fixed, b: int) -> None:
        self.filled.append((into, b))


class Layout:
    """Of so many rows, of which the first decode."""

    def __init__(self, decode: int, rows: int, padded: int) -> None:
        self.singles, self.rows, self.tokens = range(decode), rows, range(padded)


MOST = Fixed(0, 1, 0, 8)


def forwards(room: int = 1000, *, captured: bool = True) -> MixedForwards:
    """Of a model of 20 layers."""
    ran: list[tuple[int, int]] = []

    def part(first: int, end: int, between: Any, batch: Any) -> tuple[torch.Tensor, None]:
        ran.append((first, end))
        return torch.zeros(batch.rows, 1), None

    sizes = mixed_sizes(256, 8192, Numerics())
    made = MixedForwards(Counted(room), part, 20, FakeDevice(torch.device("cpu")), sizes, MOST)
    if not captured:
        return made
    assert made.capture() == len(sizes)
    assert ran == [(0, 8), (8, 16), (16, 20)] * 2 * len(sizes)  # once as it is loaded, once as it is captured
    return made


@pytest.mark.parametrize("places", [1, 4, 100, 256])
@pytest.mark.parametrize("batch_tokens", [64, 512, 8192])
def test_sizes_hold_most_decode_rows_and_no_more_than_a_batch(places: int, batch_tokens: int) -> None:
    sizes = mixed_sizes(places, batch_tokens, Numerics())
    assert all(decode < rows <= batch_tokens for decode, rows in sizes)
    assert list(sizes) == sorted(sizes, key=lambda size: (size.rows, size.decode))
    assert len({decode for decode, _ in sizes}) <= 3
    if batch_tokens == 8192:
        assert max(decode for decode, _ in sizes) >= places


@given(st.integers(0, 300), st.lists(st.integers(1, 400), max_size=4))
def test_a_batch_gets_the_fewest_rows_of_a_size_that_holds_it(decode: int, lengths: list[int]) -> None:
    segments = [Segment(Kind.DECODE, n, 0, 1) for n in range(decode)]
    segments += [Segment(Kind.FINETUNE if n == 3 else Kind.PREFILL, n, 0, length) for n, length in enumerate(lengths)]
    count, sizes = decode + sum(lengths), mixed_sizes(256, 8192, Numerics())
    made = forwards(captured=False)
    fitting = [size.rows for size in sizes if size.decode >= decode and size.rows >= count]
    assert made.rows(segments) == (min(fitting, default=0) if lengths else 0)


@pytest.mark.parametrize(("host_s", "most"), [(0.0, 128), (0.25, 256), (0.64, 640), (9.0, 768)])
def test_sizes_that_take_longer_than_the_host_are_left_out(host_s: float, most: int) -> None:
    """A device takes a millisecond a row, and no less than the host to launch it."""
    now, count = [0.0], [0]

    def part(first: int, end: int, between: Any, batch: Any) -> tuple[torch.Tensor, None]:
        count[0] += 1
        slow = 50.0 if count[0] % TIMES == 1 else 0.0  # what is used for the first time is loaded
        now[0] += max(host_s, batch.rows / 1e3) + slow
        return torch.zeros(1, 1), None

    sizes = mixed_sizes(256, 8192, Numerics())
    made = MixedForwards(Counted(0), part, 1, CpuDevice(torch.device("cpu")), sizes, MOST)
    made.trim(lambda: now[0])
    found = {rows for rows in range(1, 800) if made.rows([Segment(Kind.PREFILL, 0, 0, rows)]) > 0}
    assert found == set(range(1, most + 1))


def test_the_least_decode_rows_that_have_room_are_found() -> None:
    made = forwards()
    rows = 320
    found = {d: made.find(Layout(d, rows - 9, rows), d) for d in (0, 64, 65, 256)}  # type: ignore[arg-type]
    decode = {d: None if each is None else each.batch.rows - each.batch.others for d, each in found.items()}
    assert decode == {0: 64, 64: 64, 65: 256, 256: 256}
    assert made.find(Layout(9, 9, rows), 9) is None  # type: ignore[arg-type]
    assert made.find(Layout(9, 300, 301), 9) is None  # type: ignore[arg-type]
    assert forwards(room=5).find(Layout(9, 300, rows), 9) is None  # type: ignore[arg-type]


def test_it_can_be_ended_between_its_parts_alone() -> None:
    made = forwards()
    captured = made.find(Layout(9, 300, 320), 9)  # type: ignore[arg-type]
    assert captured is not None
    asked: list[int] = []
    assert made.replay(captured, 9, lambda layer: asked.append(layer) or True) is captured.hidden  # type: ignore[func-returns-value]
    assert asked == [LAYERS, 2 * LAYERS]
    assert made.replay(captured, 9, lambda layer: layer < 2 * LAYERS) is None
