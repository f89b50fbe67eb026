"""How often each token is in a request's output, on the device: what is chosen there is counted without the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from coserve_engine.device.protocol import Device

IN_PROMPT, ONCE_MORE = 1, 2
"""A count holds twice the times that the output has a token, plus one where the prompt has it."""


class TokenCounts:
    """Places of int32 [vocab] in one table, for requests with penalties; it grows as they are asked for."""

    def __init__(self, vocab: int, device: Device) -> None:
        self._device = device
        self._free: list[int] = []
        self.table = torch.zeros(0, vocab, dtype=torch.int32, device=device.device)
        """[places, vocab]."""

    def take(self, prompt: Sequence[int], output: Sequence[int]) -> int:
        """A place that counts these tokens."""
        if not self._free:
            had = self.table.shape[0]
            added = torch.zeros(max(4, had), self.table.shape[1], dtype=torch.int32, device=self.table.device)
            self.table = torch.cat([self.table, added])
            self._free = list(range(self.table.shape[0] - 1, had - 1, -1))
        place = self._free.pop()
        row = self.table[place].zero_()
        row.index_fill_(0, self._device.stage(prompt, torch.int64), IN_PROMPT)
        if output:
            again = torch.full((len(output),), ONCE_MORE, dtype=torch.int32, device=row.device)
            row.index_add_(0, self._device.stage(output, torch.int64), again)
        return place

    def give(self, place: int) -> None:
        """The next one's; what is computed with it until then is of no use."""
        self._free.append(place)
