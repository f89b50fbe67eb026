"""The addressed dropout masks: the integers are the definition's, and they behave like independent coins."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from coserve_engine.config import LINEARS
from coserve_engine.kernels import dropout as module
from coserve_engine.kernels.dropout import dropout, dropout_mask, row_keys

WORD = (1 << 32) - 1
Z = 5.0
"""Standard deviations that a statistic may be off; the masks are fixed, so a pass is a pass for ever."""


def mix(x: int, *, last: bool = True) -> int:
    """lowbias32 as published, with unbounded integers cut to 32 bits."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & WORD
    return x ^ (x >> 16) if last else x


def fold(*words: int) -> int:
    key = 0
    for word in words:
        for half in (word & WORD, (word >> 32) & WORD):
            key = mix(((key + 0x9E3779B9) & WORD) ^ half)
    return key


def kept(
    seed: int, uid: int, turn: int, epoch: int, position: int, layer: int, linear: str, channel: int, p: float
) -> bool:
    row = mix(position ^ (fold(seed, uid, epoch, turn) if turn else fold(seed, uid, epoch)))
    column = mix(channel ^ fold(layer, LINEARS.index(linear)))
    drawn = mix(row ^ column, last=False)
    signed = drawn - (1 << 32) if drawn >> 31 else drawn
    return signed >= round(p * 2**32) - (1 << 31)


def masks(p: float = 0.5, rows: int = 256, channels: int = 512, **at: int | str) -> torch.Tensor:
    """A mask as -1 and +1, float64 [rows, channels]."""
    where = {"seed": 1, "uid": 7, "turn": 0, "epoch": 0, "layer": 0, "linear": "q_proj"} | at
    seed, uid, epoch, turn = (int(where[name]) for name in ("seed", "uid", "epoch", "turn"))
    keys = row_keys(seed, uid, epoch, torch.arange(rows), turn)
    return dropout_mask(keys, int(where["layer"]), str(where["linear"]), channels, p).double() * 2 - 1


@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    uid=st.integers(0, 2**63 - 1),
    turn=st.just(0) | st.integers(0, 2**31 - 1),
    epoch=st.integers(0, 2**31),
    position=st.integers(0, 2**17),
    layer=st.integers(0, 200),
    linear=st.sampled_from(LINEARS),
    p=st.floats(0.0, 0.9),
)
def test_the_tensor_code_computes_the_definition(
    seed: int, uid: int, turn: int, epoch: int, position: int, layer: int, linear: str, p: float
) -> None:
    keys = row_keys(seed, uid, epoch, torch.tensor([position, position + 1, position]), turn)
    mask = dropout_mask(keys, layer, linear, 37, p)
    for row, at in enumerate((position, position + 1, position)):
        expected = [kept(seed, uid, turn, epoch, at, layer, linear, channel, p) for channel in range(37)]
        assert mask[row].tolist() == expected


def test_a_row_does_not_depend_on_its_window() -> None:
    whole = dropout_mask(row_keys(3, 5, 1, torch.arange(200)), 1, "up_proj", 64, 0.3)
    part = dropout_mask(row_keys(3, 5, 1, torch.arange(130, 140)), 1, "up_proj", 64, 0.3)
    assert torch.equal(whole[130:140], part)


@pytest.mark.parametrize("p", [0.01, 0.05, 0.1, 0.5, 0.9])
def test_mean_and_variance_are_a_coins(p: float) -> None:
    drawn = torch.stack([(masks(p, layer=layer, linear=linear) + 1) / 2 for layer in (0, 5) for linear in LINEARS])
    deviation = math.sqrt(p * (1 - p) / drawn.numel())
    assert abs(float(drawn.mean()) - (1 - p)) < Z * deviation
    assert float(drawn.var()) == pytest.approx(p * (1 - p), rel=0.02)


@pytest.mark.parametrize("axis", ["rows", "channels", "layers"])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_chi_square_of_counts_along_an_axis(p: float, axis: str) -> None:
    drawn = torch.stack([(masks(p, rows=128, layer=layer) + 1) / 2 for layer in range(64)])  # [layers, rows, channels]
    others = {"rows": (0, 2), "channels": (0, 1), "layers": (1, 2)}[axis]
    counts = drawn.sum(others)
    trials = drawn.numel() / counts.numel()
    chi2 = float(((counts - trials * (1 - p)) ** 2).sum() / (trials * p * (1 - p)))
    freedom = counts.numel()
    assert abs(chi2 - freedom) < Z * math.sqrt(2 * freedom)


NEIGHBOURS = {
    "seed": ({"seed": 1}, {"seed": 2}),
    "seed, upper half": ({"seed": 1}, {"seed": 1 + (1 << 32)}),
    "uid": ({"uid": 7}, {"uid": 8}),
    "epoch": ({"epoch": 0}, {"epoch": 1}),
    "turn": ({"turn": 1}, {"turn": 2}),
    "no turn": ({"turn": 0}, {"turn": 1}),
    "turn and epoch": ({"turn": 1, "epoch": 2}, {"turn": 2, "epoch": 1}),
    "turn and uid": ({"turn": 1, "uid": 8}, {"turn": 2, "uid": 7}),
    "uid and epoch": ({"uid": 7, "epoch": 1}, {"uid": 8, "epoch": 0}),
    "layer": ({"layer": 0}, {"layer": 1}),
    "linear": ({"linear": "q_proj"}, {"linear": "k_proj"}),
    "layer and linear": ({"layer": 1, "linear": "q_proj"}, {"layer": 0, "linear": "k_proj"}),
}


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean of the product of two masks of -1 and +1, in its standard deviations."""
    return float((a * b).mean()) * math.sqrt(a.numel())


@pytest.mark.parametrize("what", NEIGHBOURS)
def test_neighbouring_addresses_are_uncorrelated(what: str) -> None:
    first, second = (masks(**at) for at in NEIGHBOURS[what])  # type: ignore[arg-type]
    assert abs(correlation(first, second)) < Z


@pytest.mark.parametrize("apart", [1, 2, 4, 16, 64, 128])
def test_neighbouring_rows_and_channels_are_uncorrelated(apart: int) -> None:
    drawn = masks()
    assert abs(correlation(drawn[apart:], drawn[:-apart])) < Z
    assert abs(correlation(drawn[:, apart:], drawn[:, :-apart])) < Z
    corners = drawn[apart:, apart:] * drawn[apart:, :-apart] * drawn[:-apart, apart:] * drawn[:-apart, :-apart]
    assert abs(float(corners.mean())) * math.sqrt(corners.numel()) < Z


def test_every_row_and_channel_is_its_own() -> None:
    drawn = masks()
    rows, channels = drawn @ drawn.t(), drawn.t() @ drawn
    for gram, count in ((rows, drawn.shape[1]), (channels, drawn.shape[0])):
        apart = gram - torch.diag(gram.diagonal())
        assert float(apart.abs().max()) < 6 * math.sqrt(count)


def test_one_bit_of_an_address_changes_half_of_the_mask() -> None:
    base = masks(rows=64)
    for field, bits in (("seed", 64), ("uid", 48), ("turn", 16), ("epoch", 16), ("layer", 7)):
        for bit in range(bits):
            start = {"seed": 1, "uid": 7, "turn": 0, "epoch": 0, "layer": 0}[field]
            flipped = masks(rows=64, **{field: start ^ (1 << bit) if bit < 63 else start - (1 << 63)})
            changed = float((flipped != base).double().mean())
            assert abs(changed - 0.5) < Z * 0.5 / math.sqrt(base.numel()), (field, bit)


def test_the_statistics_catch_a_weak_mixer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without the mixer the corners of every rectangle depend on each other."""
    monkeypatch.setattr(module, "_mix_", lambda x: x)
    drawn = masks()
    corners = drawn[1:, 1:] * drawn[1:, :-1] * drawn[:-1, 1:] * drawn[:-1, :-1]
    assert abs(float(corners.mean())) * math.sqrt(corners.numel()) > 2 * Z


def test_values_are_scaled_as_torch_does() -> None:
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    keys = row_keys(1, 2, 0, torch.arange(64))
    mask = dropout_mask(keys, 0, "o_proj", 96, 0.25)
    y = dropout(x, keys, 0, "o_proj", 0.25)
    assert torch.equal(y[mask], x[mask] * (1 / 0.75))
    assert not y[~mask].any()
    assert dropout(x, keys, 0, "o_proj", 0.0) is x
