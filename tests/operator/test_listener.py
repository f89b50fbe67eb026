"""What is told by events alone is asked for seldom, however many objects wait."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from coserve_operator.apply.listener import EVERY_S, Listener
from coserve_operator.kube import UnavailableError

NAMESPACE = "ml"


class Told:
    """An API server whose Job controller could not make any pod."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.away = False

    async def events_of(self, namespace: str, uid: str) -> list[dict[str, Any]]:
        self.asked.append(uid)
        if self.away:
            raise UnavailableError(0, "away")
        return [{"reason": "FailedCreate", "message": f"pods of {uid} exceed a quota"}, {"reason": "Other"}]


async def test_hundreds_that_wait_are_asked_about_in_turn_and_each_is_told(make: Any) -> None:
    told = Told()
    listener = Listener(told)  # type: ignore[arg-type]
    known: dict[str, int] = {}
    for second in range(300):
        for number in range(100):
            uid = f"j-{(number + 7 * second) % 100}"
            now = make.NOW + timedelta(seconds=second + number / 100)
            obstacle = await listener.of_pods_of(NAMESPACE, uid, now)
            assert obstacle is not None or uid not in known, "what was said stands until it is asked again"
            if obstacle is not None:
                known.setdefault(uid, second)
    assert len(told.asked) <= 300 / EVERY_S
    assert len(known) == 100


async def test_one_that_waits_is_told_at_once_and_what_cannot_be_asked_is_not_known(make: Any) -> None:
    told = Told()
    listener = Listener(told)  # type: ignore[arg-type]
    assert await listener.of_pods_of(NAMESPACE, "j-1", make.NOW) is not None
    told.away = True
    assert await listener.of_pods_of(NAMESPACE, "j-1", make.NOW + timedelta(seconds=EVERY_S)) is None
