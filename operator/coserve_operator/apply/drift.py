"""What others do to fields of ours: taken back at once, but from somebody who insists, less and less often."""

from collections.abc import Callable
from dataclasses import dataclass, field

from coserve_operator.apply.ownership import Fields
from coserve_operator.decide.observed import Drift

OFTEN = 3
"""Times that one field is lost until somebody is taken to insist."""
FIRST_WAIT_S, LONGEST_WAIT_S = 30.0, 600.0
CALM_S = 1800.0
"""An object of which nothing was lost for this long has a clean slate."""


@dataclass
class _Losses:
    """Of one object: how often each field was lost, who took the last, and when it is taken back."""

    times: dict[str, int] = field(default_factory=dict)
    last: str = ""
    manager: str = ""
    at: float = 0.0
    until: float = 0.0

    def most(self) -> int:
        return max(self.times.values(), default=0)


class Drifts:
    """Of all objects, by their owner."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._losses: dict[str, dict[str, _Losses]] = {}

    def note(self, owner_uid: str, what: str, lost: Fields, manager: str) -> None:
        """Count fields of `what`, a kind and a name, that `manager` changed."""
        now, found = self._clock(), self._losses.setdefault(owner_uid, {}).setdefault(what, _Losses())
        if now - found.at > CALM_S:
            found.times.clear()
        for path in lost:
            found.times[path] = found.times.get(path, 0) + 1
        found.last, found.manager = max(lost, key=lambda path: (found.times[path], path)), manager
        above = found.most() - OFTEN
        found.at, found.until = now, now
        if above >= 0:
            found.until += min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** min(above, 30))

    def wait_s(self, owner_uid: str, what: str) -> float:
        """In how many seconds to take back what was lost; 0 is now."""
        found = self._losses.get(owner_uid, {}).get(what)
        return max(0.0, found.until - self._clock()) if found is not None else 0.0

    def insisted(self, owner_uid: str) -> tuple[Drift, ...]:
        """Objects of an owner of which somebody has changed the same field again and again, and not long ago."""
        found, now = self._losses.get(owner_uid, {}), self._clock()
        for what in [what for what, each in found.items() if now - each.at > CALM_S]:
            del found[what]
        return tuple(
            Drift(what, each.last, each.manager, each.most(), max(0.0, each.until - now), each.at + CALM_S - now)
            for what, each in found.items()
            if each.most() >= OFTEN
        )

    def forget(self, owner_uid: str) -> None:
        """Drop an owner that is gone."""
        self._losses.pop(owner_uid, None)
