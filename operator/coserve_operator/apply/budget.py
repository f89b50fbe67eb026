"""When a status is written: a change of state at once, mere progress now and then, since jobs may be thousands."""

from collections.abc import Callable
from typing import Any

Status = dict[str, Any]
PROGRESS = frozenset({"progress", "checkpoint"})
PROGRESS_EVERY_S = 2.0
LOAD = frozenset({"saturationPercent", "slo"})
LOAD_EVERY_S = 10.0


class StatusBudget:
    """Remembers when the status of each object was written last."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._written: dict[str, float] = {}

    def delay_s(self, uid: str, old: Status, new: Status, minor: frozenset[str], every_s: float) -> float | None:
        """Return in how many seconds to write `new`: 0 is now, None is never, since nothing changed.

        `minor` names the fields that can wait until `every_s` seconds after the last write.
        """
        if old == new:
            return None
        if _without(old, minor) != _without(new, minor):
            return 0.0
        written = self._written.get(uid)
        return 0.0 if written is None else max(0.0, written + every_s - self._clock())

    def written(self, uid: str) -> None:
        """Note that the object's status was written now."""
        self._written[uid] = self._clock()

    def forget(self, uid: str) -> None:
        """Drop an object that is gone."""
        self._written.pop(uid, None)


def _without(status: Status, fields: frozenset[str]) -> Status:
    return {name: value for name, value in status.items() if name not in fields}
