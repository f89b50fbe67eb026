"""What is simulated, and what the parts of one run share."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from coserve_engine.simulate.machine import Machine
from coserve_engine.simulate.pauses import NONE, Pauses, Pausing


@dataclass(frozen=True, slots=True)
class Setup:
    """An engine and its machine. `noise` is the standard deviation of log(actual / true) of each forward and unit."""

    machine: Machine
    ttft_s: float = 1.0
    tpot_s: float = 0.1
    noise: float = 0.05
    seed: int = 0
    max_slowdown: float | None = None
    max_requests: int = 64
    max_batch_tokens: int = 512
    kv_pages: int = 1024
    pass_tokens: int = 512
    sample_tokens: int | None = None
    """Of each sample in a pass; None: a pass is one sample."""
    max_window_rows: int | None = None
    passes_per_step: int = 4
    tile: int = 64
    page: int = 64
    pauses: Pauses = NONE
    needs_host: bool = False
    """Whether each token of a request is needed on the host before the next can be planned."""


class Time:
    """The host's clock, which moves by what the host does, and by its pauses; what the machine's noise makes of it."""

    def __init__(self, setup: Setup) -> None:
        self.now = 0.0
        self.noise = random.Random(setup.seed)
        self._deviation = setup.noise
        self._pausing = Pausing(setup.pauses, setup.seed)

    @property
    def paused_s(self) -> float:
        """Of all pauses until now."""
        return self._pausing.total_s

    def spend(self, seconds: float) -> None:
        """Work of so many seconds, and the pauses in it."""
        self.now = self._pausing.after(self.now, seconds)

    def error(self) -> float:
        """Actual / true seconds of a forward or unit."""
        return math.exp(self.noise.gauss(0.0, self._deviation))
