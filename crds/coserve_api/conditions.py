"""Conditions after the Kubernetes API conventions: a list keyed by type, whose transition time changes only when the
status does.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from coserve_api.common import StatusModel, Timestamp, timestamp


class ConditionStatus(StrEnum):
    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"


class Condition(StatusModel):
    """One aspect of an object's state."""

    type: Annotated[str, Field(min_length=1, max_length=64)]
    """What the condition is about."""
    status: ConditionStatus
    """True, False or Unknown."""
    reason: Annotated[str, Field(min_length=1, max_length=64, pattern="^[A-Za-z][A-Za-z0-9]*$")]
    """Why, in one CamelCase word."""
    message: Annotated[str, Field(max_length=2048)] = ""
    """Why, for a reader: what to change where there is something to change."""
    observed_generation: Annotated[int, Field(ge=0)] = 0
    """The metadata.generation that this condition is based on."""
    last_transition_time: Timestamp
    """When `status` last changed."""


def condition(
    type: str, status: bool | None, reason: str, message: str, *, generation: int, now: datetime
) -> Condition:
    """A condition that changes at `now`; `status` None is Unknown. A message above 2048 characters is cut."""
    word = ConditionStatus.UNKNOWN if status is None else ConditionStatus.TRUE if status else ConditionStatus.FALSE
    return Condition(
        type=type,
        status=word,
        reason=reason,
        message=message[:2048],
        observed_generation=generation,
        last_transition_time=timestamp(now),
    )


def merge_conditions(old: Iterable[Condition], new: Iterable[Condition]) -> tuple[Condition, ...]:
    """`old` with `new` put in by type, in order of appearance; a status that stays keeps its transition time."""
    merged = {each.type: each for each in old}
    for each in new:
        before = merged.get(each.type)
        if before is not None and before.status == each.status:
            each = each.model_copy(update={"last_transition_time": before.last_transition_time})  # noqa: PLW2901
        merged[each.type] = each
    return tuple(merged.values())


def find_condition(conditions: Iterable[Condition], type: str) -> Condition | None:
    """The condition of that type, if there is one."""
    return next((each for each in conditions if each.type == type), None)
