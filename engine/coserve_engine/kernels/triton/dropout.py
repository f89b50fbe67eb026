"""Masks of `kernels.dropout` inside a kernel, bit for bit: arithmetic modulo 2^32, where nothing overflows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mix(x):
    """lowbias32 of uint32 but for its last shift, as the twin's."""
    x ^= x >> 16
    x = tl.mul(x, 0x7FEB352D, sanitize_overflow=False)
    x ^= x >> 15
    return tl.mul(x, 0x846CA68B, sanitize_overflow=False)


@triton.jit
def column_keys(columns, fold):
    """uint32 of columns int32, for the key `fold` (int32) of a layer's linear."""
    x = _mix(columns.to(tl.uint32, bitcast=True) ^ fold.to(tl.uint32, bitcast=True))
    return x ^ (x >> 16)


@triton.jit
def kept(rows, columns, threshold):
    """Which elements are kept, for keys uint32 of rows and of columns that broadcast: those whose hash is at least
    `threshold` (int32), p * 2^32 - 2^31.
    """
    return _mix(rows ^ columns).to(tl.int32, bitcast=True) >= threshold
