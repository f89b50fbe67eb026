"""What a GPU's kernels take by bytes and operations (roofline, Williams et al., 2009), with the steps of a product's
output tiles. Shares of the peaks are those that libraries are reported to reach; nothing here was timed by us.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple


class Host(NamedTuple):
    """Seconds of the processor beside it for an iteration: to plan it, stage it and read what the one before gave,
    besides launches; and for each request in it.
    """

    plan_s: float
    request_s: float

    def planning_s(self, requests: int) -> float:
        """Of an iteration of so many requests."""
        return self.plan_s + requests * self.request_s


@dataclass(frozen=True, slots=True)
class Device:
    """Rates of a device.

    Args:
        tiles: (rows, columns, share of `flops_per_s`) of a product's output tiles; the library takes the quickest.
        streaming: share of `bytes_per_s` that kernels reach.
        launch_s: the host's time for one launch.
        kernel_s: the device's time between two kernels.
    """

    flops_per_s: float
    bytes_per_s: float
    multiprocessors: int
    tiles: tuple[tuple[int, int, float], ...]
    streaming: float
    launch_s: float
    kernel_s: float

    @property
    def best_flops_per_s(self) -> float:
        """Of products that fill it."""
        return self.flops_per_s * max(share for _, _, share in self.tiles)

    def product_s(self, rows: int, out: int, into: int, itemsize: int) -> float:
        """Seconds of [rows, into] times [into, out]: its bytes, or whole waves of output tiles where these take longer.
        Where all rows are in one tile, several multiprocessors share its sum over `into`, so that all of them read.
        """
        each, least_s = self.flops_per_s / self.multiprocessors, float("inf")
        for high, wide, share in self.tiles:
            count = -(-rows // high) * -(-out // wide)
            waves = count / self.multiprocessors if rows <= high else float(-(-count // self.multiprocessors))
            least_s = min(least_s, waves * 2 * high * wide * into / (share * each))
        return max(self.moved_s(itemsize * (out * into + rows * (out + into))), least_s)

    def moved_s(self, size: float) -> float:
        """Seconds to read or write so many bytes."""
        return size / (self.streaming * self.bytes_per_s)

    def slower(self, factor: float) -> Device:
        """A part of it: everything takes `factor` times as long."""
        return replace(
            self,
            flops_per_s=self.flops_per_s / factor,
            bytes_per_s=self.bytes_per_s / factor,
            launch_s=factor * self.launch_s,
            kernel_s=factor * self.kernel_s,
        )


H200 = Device(
    flops_per_s=788e12,
    bytes_per_s=4.3e12,
    multiprocessors=132,
    tiles=((128, 256, 0.87), (128, 128, 0.73), (64, 256, 0.7), (64, 128, 0.6)),
    streaming=0.87,
    launch_s=5e-6,
    kernel_s=1e-6,
)
BUDGET = Host(plan_s=4e-3 / 3, request_s=2e-3 / 192)
"""What an engine's host may take: 2 ms at 64 requests, 4 ms at 256."""
