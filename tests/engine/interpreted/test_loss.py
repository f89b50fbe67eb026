"""Log-probabilities and what they pass back against torch's in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bounds import close
from mutants import mutant

from coserve_engine.kernels.triton import loss

NAN, INF = float("nan"), float("inf")


def drawn(rows: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits with NaN behind the last row's, and targets."""
    draw = torch.Generator().manual_seed(vocab)
    room = torch.full((rows + 1, vocab), NAN)
    room[:-1] = torch.randn(rows, vocab, generator=draw) * 4 + torch.randn(rows, 1, generator=draw) * 20
    return room[:-1], torch.randint(vocab, (rows,), generator=draw)


def check(of: Any, raced: Any, rows: int, vocab: int, out: torch.dtype = torch.float32) -> None:
    logits, targets = drawn(rows, vocab)
    before = logits.clone()
    logp, lse, finite = raced(lambda: of.score(logits, targets))
    wide = before.double().requires_grad_()
    true = torch.log_softmax(wide, -1)
    picked = true.gather(1, targets.unsqueeze(1)).squeeze(1)
    close(logp, picked, torch.float32, sums=4)
    close(lse, torch.logsumexp(wide, -1), torch.float32, sums=2)
    assert bool(finite.all())
    found = raced(lambda: (of.log_softmax(before.clone()),))[0]
    close(found, true, torch.float32, sums=4)
    assert torch.equal(found.gather(1, targets.unsqueeze(1)).squeeze(1), logp), "the same bits"
    slope = torch.randn(rows, generator=torch.Generator().manual_seed(1))
    (expected,) = torch.autograd.grad(picked, wide, slope.double())
    (d,) = raced(lambda: (of.backward(logits, targets, lse, slope, torch.empty(rows, vocab, dtype=out)),))
    close(d, expected, out, sums=32 if out is torch.float32 else 1)  # an error of lse, 5e-6 at 40, is one of each
    assert torch.equal(logits, before)
    if out is torch.float32:
        assert of.backward(logits, targets, lse, slope, logits) is logits
        assert torch.equal(logits, d), "in their place, too"


@pytest.mark.parametrize("block", [64, 2048])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (3, 50), (4, 333), (2, 192), (2, 4099)])
def test_loss(
    raced: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int, vocab: int, block: int
) -> None:
    """Vocabularies below a block, of several, and of any remainder."""
    monkeypatch.setattr(loss, "BLOCK", max(block, vocab // 8 // 64 * 64))
    check(loss, raced, rows, vocab, dtype)


def test_each_logit_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row for each token that alone is likely: its probability is one, and a row's of two a half."""
    monkeypatch.setattr(loss, "BLOCK", 16)
    vocab = 40
    logits, targets = torch.full((vocab, vocab), -50.0).fill_diagonal_(3.0), torch.arange(vocab)
    logp, lse, _ = loss.score(logits, targets)
    assert torch.equal(logp, torch.zeros(vocab))
    assert torch.equal(lse, torch.full((vocab,), 3.0))
    logits += logits.roll(17, 1) + 50
    close(loss.score(logits, targets)[0], torch.full((vocab,), 0.5).double().log(), torch.float32, sums=2)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("at", [0, 21, 39])
def test_a_row_that_is_not_finite_is_told_and_alone(monkeypatch: pytest.MonkeyPatch, bad: float, at: int) -> None:
    monkeypatch.setattr(loss, "BLOCK", 16)
    logits, targets = drawn(3, 40)
    alone, _, all_finite = loss.score(logits, targets)
    logits[1, at] = bad
    targets[1] = at
    logp, _, finite = loss.score(logits, targets)
    assert all_finite.tolist() == [True, True, True]
    assert finite.tolist() == [True, False, True]
    assert not logp[1].isfinite()
    assert torch.equal(logp[::2], alone[::2])


def test_extremes_are_finite() -> None:
    """Where the plain sum would overflow, or be of nothing."""
    logits = torch.tensor([[3e38, -1e38, 0.0], [-1e4, -1e4, -1e4], [200.0, 200.0, 200.0], [-200.0, -201.0, -400.0]])
    targets = torch.tensor([0, 1, 2, 1])
    logp, lse, finite = loss.score(logits, targets)
    assert finite.all()
    true = torch.log_softmax(logits.double(), -1).gather(1, targets.unsqueeze(1)).squeeze(1)
    close(logp[:1], true[:1], torch.float32, sums=0)
    close(logp[1:], true[1:], torch.float32, sums=4096)  # what 1e4 leaves of a logarithm
    close(logp[2:], true[2:], torch.float32, sums=64)
    close(lse, torch.logsumexp(logits.double(), -1), torch.float32, sums=1)
    assert loss.score(torch.full((1, 3), -3e38), torch.zeros(1, dtype=torch.int64))[0].isfinite()


def test_no_rows() -> None:
    logits, targets, none = torch.zeros(0, 40), torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    assert [x.shape for x in loss.score(logits, targets)] == [(0,)] * 3
    assert loss.log_softmax(logits) is logits
    assert loss.backward(logits, targets, none, none, logits) is logits


MUTANTS = {
    "a tail that is left out": ("inside = first + lane < VOCAB", "inside = first + lane < VOCAB // BLOCK * BLOCK"),
    "a tail that reads on": ("inside = first + lane < VOCAB", "inside = first + lane < VOCAB + 1"),
    "a sum that keeps its old scale": ("total * tl.exp(highest - above)", "total"),
    "lanes of one scale": ("tl.exp(highest - top)", "tl.exp(highest * 0)"),
    "another target": ("tl.load(targets_ptr + row))", "tl.load(targets_ptr + row) // 2)"),
    "a row before": ("row * VOCAB + column", "row * (VOCAB - 1) + column"),
    "a slope of the other sign": (", slope, 0.0)", ", -slope, 0.0)"),
    "a softmax without slope": ("tl.load(lse_ptr + row)) * slope", "tl.load(lse_ptr + row))"),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=MUTANTS.keys())
def test_what_is_wrong_on_purpose_is_seen(raced: Any, tmp_path: Path, change: tuple[str, str]) -> None:
    wrong = mutant(loss, tmp_path, *change)
    wrong.BLOCK = 64
    with pytest.raises(AssertionError):
        check(wrong, raced, 4, 333)
