"""Log-probabilities of logits and what they pass back, a row a program: its sum is made in one pass (online softmax,
Milakov and Gimelshein 2018), each lane with a maximum of its own, so that nothing waits but once, at the end.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from coserve_engine.kernels.triton.launch import Constants, Kernel, cover

BLOCK = 2048


@triton.jit
def _sums(logits_ptr, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Log-sum-exp of a row, NaN where it holds a NaN or +inf, and its lowest logit or 0."""
    lane = tl.arange(0, BLOCK)
    highest = tl.full([BLOCK], -3.0e38, tl.float32)  # finite: a lane may see nothing
    total = tl.zeros([BLOCK], tl.float32)
    lowest = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, VOCAB, BLOCK, num_stages=4):  # without a dot, loads go ahead only where a loop says so
        inside = first + lane < VOCAB
        x = tl.load(logits_ptr + first + lane, mask=inside, other=float("-inf"))
        above = tl.maximum(highest, x)
        total = total * tl.exp(highest - above) + tl.exp(x - above)
        highest = above
        lowest = tl.minimum(lowest, tl.where(inside, x, 0.0))
    top = tl.max(highest)
    return top + tl.log(tl.sum(total * tl.exp(highest - top))), tl.min(lowest)


@triton.jit(do_not_specialize_on_alignment=["targets_ptr"])
def _score(
    logits_ptr,  # [N, VOCAB], float32
    targets_ptr,  # [N], int64
    logp_ptr,  # [N], float32
    lse_ptr,  # [N], float32
    finite_ptr,  # [N], bool
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * VOCAB
    lse, lowest = _sums(logits_ptr, VOCAB, BLOCK)
    tl.store(logp_ptr + row, tl.load(logits_ptr + tl.load(targets_ptr + row)) - lse)
    tl.store(lse_ptr + row, lse)
    tl.store(finite_ptr + row, (tl.abs(lse) < float("inf")) & (lowest > float("-inf")))


@triton.jit
def _log_softmax(
    logits_ptr,  # [N, VOCAB], float32; log-probabilities take its place
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    logits_ptr += tl.program_id(0).to(tl.int64) * VOCAB
    lse, _ = _sums(logits_ptr, VOCAB, BLOCK)
    for first in range(0, VOCAB, BLOCK):
        at = logits_ptr + first + tl.arange(0, BLOCK)
        inside = first + tl.arange(0, BLOCK) < VOCAB
        tl.store(at, tl.load(at, mask=inside) - lse, mask=inside)


@triton.jit(do_not_specialize_on_alignment=["targets_ptr", "lse_ptr", "slope_ptr"])
def _backward(
    logits_ptr,  # [N, VOCAB], float32
    targets_ptr,  # [N], int64
    lse_ptr,  # [N], float32
    slope_ptr,  # [N], float32
    d_ptr,  # [N, VOCAB], may be logits_ptr
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < VOCAB
    at = row * VOCAB + column
    logits = tl.load(logits_ptr + at, mask=inside, other=0.0)
    slope = tl.load(slope_ptr + row)
    d = tl.where(column == tl.load(targets_ptr + row), slope, 0.0) - tl.exp(logits - tl.load(lse_ptr + row)) * slope
    tl.store(d_ptr + at, d.to(d_ptr.dtype.element_ty), mask=inside)


SCORE, LOG_SOFTMAX, BACKWARD = Kernel(_score, warps=8), Kernel(_log_softmax, warps=8), Kernel(_backward)


@cache
def _constants(vocab: int, block: int) -> Constants:
    return Constants(VOCAB=vocab, BLOCK=block)


def score(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of logits [N, vocab] (float32, in one piece) and targets [N] (int64): the targets' log-probabilities, the
    log-sum-exp of each row, and whether all of a row's logits are finite, each [N].

    A NaN or +inf makes the log-probability of its row NaN; what another token's -inf makes is found in the flag alone.
    """
    rows, vocab = logits.shape
    logp, lse = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    finite = torch.empty(rows, dtype=torch.bool, device=logits.device)
    SCORE.launch((rows,), _constants(vocab, BLOCK), logits, targets, logp, lse, finite)
    return logp, lse, finite


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of logits [N, vocab] (float32, in one piece) in their place; a target's has the bits that
    `score` gives.
    """
    rows, vocab = logits.shape
    LOG_SOFTMAX.launch((rows,), _constants(vocab, BLOCK), logits)
    return logits


def backward(
    logits: torch.Tensor, targets: torch.Tensor, lse: torch.Tensor, slope: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """d loss / d logits = slope * (onehot(target) - softmax), computed in float32.

    Args:
        logits, targets, lse: those of `score`.
        slope: [N] float32, d loss / d log-probability.
        out: [N, vocab] in one piece, in any dtype; `logits` itself where their place may be taken.

    Returns:
        `out`.
    """
    rows, vocab = logits.shape
    grid = (rows, cover(vocab, BLOCK))
    BACKWARD.launch(grid, _constants(vocab, BLOCK), logits, targets, lse, slope, out)
    return out
