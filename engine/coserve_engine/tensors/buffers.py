"""Memory that outlives a pass. A kernel zeroes each page that is mapped anew, so fresh buffers for every pass cost tens
of milliseconds, all of it between two tokens of a request.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

ALIGN = 64
"""Bytes; every buffer begins on a cache line, as torch's own do: a product's bits can depend on addresses."""
HEAP_BYTES = 30 << 20
"""Below 32 MiB, the most that glibc goes along with."""


def keep_freed_memory() -> None:
    """Have glibc take temporaries of up to HEAP_BYTES from its heap, and keep there what is freed: it raises its bounds
    to the largest mapped block that was freed, and to twice that (mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD).
    """
    torch.empty(HEAP_BYTES, dtype=torch.uint8)


Shape = tuple[tuple[int, ...], torch.dtype]
"""Of a buffer, and what it holds."""


def _bytes(shape: Shape) -> int:
    return math.prod(shape[0]) * shape[1].itemsize


def _aligned(count: int) -> int:
    return -(-count // ALIGN) * ALIGN


class Buffers:
    """Leases buffers to owners out of one block each. A block that is given back waits for the next owner whom it
    fits, so there are never more blocks than owners at once; `clear` frees those that wait.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._free: list[torch.Tensor] = []
        self._leased: dict[int, torch.Tensor] = {}

    def lease(self, owner: int, shapes: Sequence[Shape]) -> list[torch.Tensor]:
        """Contiguous buffers of these shapes, whose values are anybody's, until `release` of the same owner."""
        sizes = [_aligned(_bytes(shape)) for shape in shapes]
        self._leased[owner] = block = self._block(sum(sizes))
        parts = zip(torch.split(block[: sum(sizes)], sizes), shapes, strict=True)
        return [part[: _bytes(shape)].view(shape[1]).view(shape[0]) for part, shape in parts]

    def release(self, owner: int) -> None:
        """The owner will not touch its buffers again."""
        self._free.append(self._leased.pop(owner))

    def clear(self) -> None:
        """Free what is not leased."""
        self._free.clear()

    @property
    def bytes(self) -> int:
        """Of all blocks."""
        return sum(block.numel() for block in (*self._free, *self._leased.values()))

    def _block(self, size: int) -> torch.Tensor:
        """The smallest free block of `size` bytes or more; else a new one in the place of the largest."""
        self._free.sort(key=torch.Tensor.numel)
        for at, block in enumerate(self._free):
            if block.numel() >= size:
                return self._free.pop(at)
        if self._free:
            self._free.pop()
        return torch.empty(size, dtype=torch.uint8, device=self.device)
