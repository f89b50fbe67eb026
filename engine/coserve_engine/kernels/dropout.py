"""LoRA dropout without a generator: every bit of a mask has an address, so that preemption, replay and windows of any
size draw the same mask.

Address: (job seed, sequence uid and turn, epoch, position, layer, linear, channel). Those up to the position are hashed
once per row, layer, linear and channel once per column; an element mixes the two. All is arithmetic modulo 2^32
(Wellons' lowbias32 as the mixer), which int32 tensors and a Triton kernel compute alike.
"""

from __future__ import annotations

import torch

from coserve_engine.config import LINEARS

_GOLDEN = 0x9E3779B9
_M1, _M2 = 0x7FEB352D, 0x846CA68B
_WORD = 0xFFFFFFFF


def _signed(value: int) -> int:
    """The int32 with the bits of `value`."""
    value &= _WORD
    return value - (1 << 32) if value >> 31 else value


def _mix_int(x: int) -> int:
    """`_mix` of one number, modulo 2^32."""
    x = ((x ^ (x >> 16)) * _M1) & _WORD
    x = ((x ^ (x >> 15)) * _M2) & _WORD
    return x ^ (x >> 16)


def _fold(*words: int) -> int:
    """A 32-bit key of integers of at most 64 bits, in order."""
    key = 0
    for word in words:
        for half in (word & _WORD, (word >> 32) & _WORD):
            key = _mix_int(((key + _GOLDEN) & _WORD) ^ half)
    return key


def _shift_xor_(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x ^= x >> bits in place, the shift filled with zeros (that of int32 repeats the sign)."""
    return x.bitwise_xor_((x >> bits).bitwise_and_(_WORD >> bits))


def _mix_(x: torch.Tensor) -> torch.Tensor:
    """lowbias32 in place, but for its last shift, which no comparison by the upper bits would see."""
    _shift_xor_(x, 16).mul_(_M1)
    return _shift_xor_(x, 15).mul_(_signed(_M2))


def row_keys(seed: int, uid: int, epoch: int, positions: torch.Tensor, turn: int = 0) -> torch.Tensor:
    """Keys of a sequence's rows.

    Args:
        seed: the job's; uid: the sequence's; epoch: the time through the data; turn: of several sequences with one uid,
            from 0, which is hashed as if there were no turns. Integers of at most 64 bits.
        positions: [R] integers, positions in the sequence.

    Returns:
        int32 [R], on the device of `positions`.
    """
    address = (seed, uid, epoch, turn) if turn else (seed, uid, epoch)
    return _shift_xor_(_mix_(positions.to(torch.int32) ^ _signed(_fold(*address))), 16)


def column_fold(layer: int, linear: str) -> int:
    """What the columns of a mask are hashed with, an int32; `linear`: a name of LINEARS."""
    return _signed(_fold(layer, LINEARS.index(linear)))


def dropout_mask(rows: torch.Tensor, layer: int, linear: str, channels: int, p: float) -> torch.Tensor:
    """Which inputs of an adapter's A are kept.

    Args:
        rows: int32 [R] from `row_keys`.
        linear: a name of LINEARS.
        p: probability of being dropped, 0 <= p < 1; its resolution is 2^-32.

    Returns:
        bool [R, channels], True where kept: where the hash, as an int32, is at least p * 2^32 - 2^31.
    """
    columns = torch.arange(channels, dtype=torch.int32, device=rows.device)
    columns = _shift_xor_(_mix_(columns ^ column_fold(layer, linear)), 16)
    return _mix_(rows.unsqueeze(1) ^ columns) >= round(p * 2.0**32) - (1 << 31)


def dropout(x: torch.Tensor, rows: torch.Tensor, layer: int, linear: str, p: float) -> torch.Tensor:
    """x [R, C] with dropped elements 0 and the others divided by 1 - p, as torch's; its own derivative for dy."""
    if p == 0.0:
        return x
    return x * dropout_mask(rows, layer, linear, x.shape[1], p).to(x.dtype).mul_(1.0 / (1.0 - p))
