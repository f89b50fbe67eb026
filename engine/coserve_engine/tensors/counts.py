"""Which tokens a request has seen and how often its output has each, on the device: what is chosen there is counted
without the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from coserve_engine.device.protocol import Device

IN_PROMPT, ONCE_MORE = 1, 2
"""A count holds twice the times that the output has a token, plus one where the prompt has it."""


class TokenCounts:
    """Places in two tables, for requests with penalties; they grow as they are asked for."""

    def __init__(self, vocab: int, device: Device) -> None:
        self._device = device
        self._free: list[int] = []
        self.counts = torch.zeros(0, vocab, dtype=torch.int32, device=device.device)
        """[places, vocab]."""
        self.seen = torch.zeros(0, 0, dtype=torch.int64, device=device.device)
        """[places, room]: tokens in the order in which they were seen, those of the prompt once; behind them, one of
        them again and again.
        """

    def take(self, prompt: Sequence[int], output: Sequence[int], room: int) -> tuple[int, int]:
        """A place that counts these tokens and has room for so many in the output, and how many different ones are in
        the prompt.
        """
        first = list(dict.fromkeys(prompt))
        self._grow(len(first) + room)
        place = self._free.pop()
        counts = self.counts[place].zero_()
        counts.index_fill_(0, self._device.stage(first, torch.int64), IN_PROMPT)
        if output:
            once = torch.full((len(output),), ONCE_MORE, dtype=counts.dtype, device=counts.device)
            counts.index_add_(0, self._device.stage(output, torch.int64), once)
        seen = self.seen[place].fill_(first[0])
        seen[: len(first) + len(output)] = self._device.stage([*first, *output], torch.int64)
        return place, len(first)

    def _grow(self, room: int) -> None:
        places, had = self.seen.shape
        if had < room:
            more = torch.zeros(places, max(room, 2 * had) - had, dtype=self.seen.dtype, device=self.seen.device)
            self.seen = torch.cat([self.seen, more], 1)
        if not self._free:
            added = max(4, places)
            self.counts = torch.cat([self.counts, self.counts.new_zeros(added, self.counts.shape[1])])
            self.seen = torch.cat([self.seen, self.seen.new_zeros(added, self.seen.shape[1])])
            self._free = list(range(places + added - 1, places - 1, -1))

    def give(self, place: int) -> None:
        """The next one's; what is computed with it until then is of no use."""
        self._free.append(place)
