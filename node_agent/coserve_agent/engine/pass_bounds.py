"""What a pass may have, as the engine says it when it is ready."""

from __future__ import annotations

from dataclasses import dataclass

from coserve_contract.shards import Sample


@dataclass(frozen=True, slots=True)
class PassBounds:
    """What a pass may have at most: tokens, and pages of the KV pool, of which each sample has its own.

    The pool bounds passes only where it has fewer pages than their samples need; the engine starts with no pool that
    holds less than one sample of its maxModelLength.
    """

    pages: int
    page_tokens: int
    tokens: int

    def pages_of(self, sample: Sample) -> int:
        return -(-len(sample.tokens) // self.page_tokens)
