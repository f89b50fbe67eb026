"""Two regimes of a device: below a knee work takes as long as its weights are read, whatever rows share the reading,
above it as long as its operations take, in steps of the rows that are launched. One line through both would err by a
tenth and more everywhere, and finetuning would get what its bound leaves.

A CPU has its knee at a dozen rows, fewer than a tile: there one line is right, and nothing here is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from coserve_engine.latency.fit import OnlineFit, Prior
from coserve_engine.latency.work import Features

SWEEP = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 24, 32, 48, 64)
"""Tiles of the forwards in which the knee is looked for."""
TIMES = 3
"""How often each is measured."""
KNEES, STEPS = range(1, 9), (1, 2, 4)
"""Tiles at which the knee may lie, and that a step may have."""
LEAST, FULL = 6, 4
"""Sizes from which a knee is found; knees that are taken to fill a device where none was."""
NEARLY = 1.06
"""Seconds a row / the fewest, within which a forward fills the device. Only powers of two of tiles are looked at: waves
of output tiles make them cheap, and what was measured says one of them more surely than one of all sizes."""
SOLVED = 30
"""Updates without news after which a fit moves no more."""
BELOW = 0.05
"""A row below the knee is taken to cost so much of one above it before it is measured."""


class Regime(NamedTuple):
    """Where operations begin to decide, in rows; of how many rows the launched ones are a multiple; with how many a row
    costs hardly more than with any number.
    """

    knee: int
    step: int
    full: int

    def launched(self, rows: float) -> int:
        """Rows that are computed for so many."""
        return -(-int(rows) // self.step) * self.step

    def forward(self, x: Features) -> Features:
        """`ForwardWork.features` -> 1, rows launched, those above the knee, decode and finetuning rows for what only
        they need (logits, an adapter), keys, pairs.
        """
        one, decode, prefill, finetune, _, kv_rows, pairs = x
        rows = self.launched(decode + prefill + finetune)
        return (one, rows, max(0, rows - self.knee), decode, finetune, kv_rows, pairs)

    def unit(self, x: Features) -> Features:
        """`UnitWork.features` -> 1, rows launched, those above the knee, pairs."""
        one, rows, _, pairs = x
        rows = self.launched(rows)
        return (one, rows, max(0, rows - self.knee), pairs)

    def forward_prior(self, prior: Prior) -> Prior:
        """What a prior of one line says of two: its fixed part is the reading, its rows are operations."""
        fixed, decode, prefill, finetune, _, kv_rows, pairs = prior.coefficients
        own = BELOW * prefill, prefill, max(0.0, decode - prefill), max(0.0, finetune - prefill)
        return Prior((fixed, *own, kv_rows, pairs), self.forward(prior.typical))

    def unit_prior(self, prior: Prior) -> Prior:
        """The same of a unit's."""
        fixed, row, _, pairs = prior.coefficients
        return Prior((fixed, BELOW * row, row, pairs), self.unit(prior.typical))


def may_have_knee(ridge_rows: float, tile: int) -> bool:
    """Whether a tile's rows still take the time of their weights' bytes: `ridge_rows` is where, by the device's rates,
    operations take as long (the ridge of its roofline).
    """
    return ridge_rows > tile


def find_regime(samples: Sequence[tuple[int, float]], tile: int, ridge_rows: float) -> Regime:
    """Knee and step with which (rows, seconds) of forwards of one sequence are fitted best, and the rows that fill the
    device; what the ridge says, where fewer than LEAST sizes were measured. The pairs of such a forward grow with the
    square of its rows.
    """
    times: dict[int, list[float]] = {}
    for rows, seconds in samples:
        times.setdefault(rows, []).append(seconds / rows)
    if len(times) < LEAST:
        knee = math.ceil(ridge_rows / tile) * tile
        return Regime(knee, tile, FULL * knee)
    row_s = {rows: median(each) for rows, each in times.items()}
    doubled = {rows: seconds for rows, seconds in row_s.items() if (rows // tile).bit_count() == 1}
    full = min(rows for rows, seconds in doubled.items() if seconds <= NEARLY * min(doubled.values()))
    found = (Regime(knee * tile, step * tile, full) for knee in KNEES for step in STEPS)
    return min(found, key=lambda regime: _error(samples, regime))


def _error(samples: Sequence[tuple[int, float]], regime: Regime) -> float:
    """Sum of squared relative errors of the best fit."""
    fit = OnlineFit(4, forgetting=1.0)
    rows = [(regime.unit((1.0, n, 0, n * n / 1e5)), seconds) for n, seconds in samples]
    fit.update(rows)
    for _ in range(SOLVED):
        fit.update([])
    return sum((fit.predict(x) / seconds - 1) ** 2 for x, seconds in rows)
