"""Which tokens rows of an iteration may choose, where a grammar says so: bits, as the host computes them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WORD = 32
"""Tokens of one number."""
ALL = -1
"""The number in which each token is allowed."""


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """Of `rows` [M] of the rows that sample, in which bit (token % 32) of number (token // 32) says that the token may
    be chosen: int32 [M, words].
    """

    rows: list[int]
    bits: NDArray[np.int32]


def words(vocab: int) -> int:
    """Numbers for so many tokens."""
    return -(-vocab // WORD)
