"""The fast product of a frozen weight is the plain one, keeps a row's bits, and gives way where it would not."""

from __future__ import annotations

import pytest
import torch

from coserve_engine.host import on_intel
from coserve_engine.kernels.cpu import linears
from coserve_engine.kernels.cpu.linears import (
    PROBED_ROWS,
    LinearChoice,
    PackedLinear,
    by_inputs,
    differing_rows,
    probed_rows,
)
from coserve_engine.kernels.plain import PlainLinear
from coserve_engine.numerics import Numerics

CPU = torch.device("cpu")
SHAPES = ((64, 48), (512, 256), (96, 1408))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biased", (False, True))
def test_packed_is_plain(shape: tuple[int, int], biased: bool) -> None:
    weight, bias = draw(*shape), draw(shape[0], seed=1) if biased else None
    packed, plain = PackedLinear(weight, bias), PlainLinear(weight.double(), None if bias is None else bias.double())
    x, dy = draw(20, shape[1], seed=2), draw(20, shape[0], seed=3)
    assert (packed.forward(x) - plain.forward(x.double())).abs().max() < 1e-4
    assert (packed.backward(dy) - plain.backward(dy.double())).abs().max() < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_chosen_keeps_a_rows_bits(shape: tuple[int, int]) -> None:
    made = LinearChoice(CPU, torch.float32, Numerics(), backward=True).make(draw(*shape))
    x, dy = draw(PROBED_ROWS[-1], shape[1], seed=2), draw(PROBED_ROWS[-1], shape[0], seed=3)
    assert differing_rows(made.forward, x, Numerics()) == []
    assert differing_rows(made.backward, dy, Numerics()) == []


def test_a_product_whose_bits_depend_on_the_rows_shows() -> None:
    x = draw(PROBED_ROWS[-1], 64)
    w = draw(32, 64, seed=1)

    def halves(rows: torch.Tensor) -> torch.Tensor:
        if rows.shape[0] > 48:
            return rows @ w.t()
        return rows[:, :13] @ w.t()[:13] + rows[:, 13:] @ w.t()[13:]

    assert differing_rows(halves, x, Numerics()) == [rows for rows in PROBED_ROWS if rows <= 48]


def test_a_product_whose_bits_depend_on_a_rows_place_shows() -> None:
    def second(rows: torch.Tensor) -> torch.Tensor:
        return rows * torch.tensor([1.0, 1.0 + 1e-6]).repeat(rows.shape[0] // 2).unsqueeze(1)

    assert differing_rows(second, draw(PROBED_ROWS[-1], 64), Numerics()) == list(PROBED_ROWS)


@pytest.mark.parametrize("shape", (*SHAPES, (64, 64), (24, 16)))
def test_a_layout_by_inputs_is_the_same_weight(shape: tuple[int, int]) -> None:
    weight = draw(*shape)
    laid = by_inputs(weight)
    assert torch.equal(laid, weight)
    assert laid.t().is_contiguous() == (shape[0] >= shape[1])


@pytest.mark.skipif(on_intel(), reason="there only MKL's strict sums keep a row's bits, in either layout")
@pytest.mark.parametrize("shape", (*SHAPES, (64, 64), (24, 16)))
def test_a_layout_by_inputs_keeps_a_rows_bits(shape: tuple[int, int]) -> None:
    laid = by_inputs(draw(*shape))
    plain, x, dy = PlainLinear(laid), draw(PROBED_ROWS[-1], shape[1], seed=2), draw(PROBED_ROWS[-1], shape[0], seed=3)
    assert differing_rows(plain.forward, x, Numerics()) == []
    assert differing_rows(plain.backward, dy, Numerics()) == []


def test_widths_that_leave_tails_keep_their_layout() -> None:
    assert by_inputs(draw(10, 8)).is_contiguous()
    assert by_inputs(draw(16, 12)).is_contiguous()


def test_it_gives_way_to_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "differing_rows", lambda *_: [8])
    choice = LinearChoice(CPU, torch.float32, Numerics(), backward=True)
    assert isinstance(choice.make(draw(64, 48)), PlainLinear)
    assert list(choice.notes()) == ["linear 64 x 48 by BLAS (packed, rows differ for [8] rows)"]


@pytest.mark.parametrize(
    ("out", "into", "rows"), ((64, 48, 320), (49152, 576, 320), (14336, 4096, 192), (128256, 4096, 64))
)
def test_how_many_rows_are_tried_depends_on_the_weight_alone(out: int, into: int, rows: int) -> None:
    """Not on a clock, or two agents of one endpoint would choose differently. A tile is tried of any."""
    assert probed_rows(out * into) == rows


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_rows_that_were_not_tried_are_said(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    seen: list[int] = []
    monkeypatch.setattr(linears, "differing_rows", lambda product, x, numerics: seen.append(len(x)) or [])
    monkeypatch.setattr(linears, "CHECK_FLOPS", 2.0 * 64 * 48 * 700)
    choice = LinearChoice(CPU, dtype, Numerics(), backward=True)
    choice.make(draw(64, 48).to(dtype))
    assert seen == ([128, 128] if dtype is torch.float32 else [])
    said = "linear 64 x 48 is large: whether rows keep their bits is tried up to 128 rows"
    assert list(choice.notes())[1:] == [said]


def test_fewer_rows_are_tried_among_themselves() -> None:
    x, w = draw(64, 64), draw(32, 64, seed=1)
    assert differing_rows(lambda rows: rows @ w.t() * (1.0 if len(rows) > 8 else 1.5), x, Numerics()) == [4, 8]


def test_float64_is_plain() -> None:
    choice = LinearChoice(CPU, torch.float64, Numerics(), backward=True)
    assert isinstance(choice.make(draw(64, 48).double()), PlainLinear)
    assert list(choice.notes()) == ["linears by BLAS (float64 on cpu)"]


def test_serving_alone_keeps_one_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "differing_rows", lambda *_: [])  # whatever this processor's rows do
    made = LinearChoice(CPU, torch.float32, Numerics(), backward=False).make(draw(64, 48))
    with pytest.raises(ValueError, match="serving only"):
        made.backward(draw(4, 64))
