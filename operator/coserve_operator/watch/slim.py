"""What pydantic keeps of each model beside its values: the set of fields that were given. Of thousands of jobs that is
a third of their memory (a set of six names takes 728 bytes, and a job has some twenty), and here nobody asks for it.
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

M = TypeVar("M", bound=BaseModel)
_NONE: set[str] = set()
"""Of every slim model. A copy of one (`model_copy`) copies it first."""


def slim(model: M) -> M:
    """Let go of those sets in `model` and in all below it, and return it; `exclude_unset` leaves all out then."""
    object.__setattr__(model, "__pydantic_fields_set__", _NONE)
    for value in model.__dict__.values():
        _slim_within(value)
    return model


def _slim_within(value: Any) -> None:
    if isinstance(value, BaseModel):
        slim(value)
    elif isinstance(value, Mapping):
        _slim_all(value.values())
    elif isinstance(value, list | tuple):
        _slim_all(value)


def _slim_all(values: Iterable[Any]) -> None:
    for value in values:
        _slim_within(value)
