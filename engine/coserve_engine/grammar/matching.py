"""Where an answer stands in its grammar, and what may come next: a function of the tokens that it has, so that one that
was put out and is computed again goes on as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import llguidance
import numpy as np
from numpy.typing import NDArray

from coserve_engine.errors import RequestError
from coserve_engine.grammar.source import refused
from coserve_engine.layout.masks import WORD


class Matching:
    """Of one answer.

    Args:
        matcher: its own; it has read nothing.
        known_end: the token by which llguidance says that the answer may end.
        ends: all tokens that end it where nothing else may follow.
    """

    def __init__(self, matcher: llguidance.LLMatcher, known_end: int, ends: Iterable[int]) -> None:
        self._matcher, self._known_end, self._ends = matcher, known_end, tuple(ends)
        self._read = 0

    def fill(self, bits: NDArray[np.int32], output: Sequence[int], ends: Sequence[int]) -> None:
        """Which tokens may follow `output`: into `bits` [words]. Where the answer is whole, it may end with one of
        `ends`; where nothing else may follow, with any that ends it.

        Raises:
            RequestError: nothing may follow, or it takes more than a grammar may.
        """
        matcher = self._matcher
        new = list(output[self._read :])
        self._read += len(new)
        if new and not matcher.consume_tokens(new):
            raise self._failed()
        matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if matcher.is_error():  # or it would let the answer end here
            raise self._failed()
        whole = bool(_has(bits, self._known_end))
        for token in self._ends:
            bits[token // WORD] &= ~_bit(token)
        more = bits.any()
        if whole:
            for token in ends if more else self._ends:
                bits[token // WORD] |= _bit(token)
        elif not more:
            raise refused("needs a token that ends the answer before it is whole; take it out of stop_token_ids")

    def _failed(self) -> RequestError:
        reason = self._matcher.get_error().partition("\n")[0]
        return refused(f"cannot be followed behind {self._read} tokens of the answer ({reason[:200]}); make it simpler")


def _bit(token: int) -> np.int32:
    return np.int32(-1 << 31 if token % WORD == WORD - 1 else 1 << token % WORD)


def _has(bits: NDArray[np.int32], token: int) -> bool:
    return bool(bits[token // WORD] & _bit(token))
