"""What can be wrong with what comes from outside, as types: each names the place, the value and the remedy."""

from __future__ import annotations


class ApiError(Exception):
    """Base of every error of this package."""


class InvalidValueError(ApiError, ValueError):
    """A value of a custom resource does not read (a duration, a URI, a quantity); a ValueError, so that pydantic
    reports its field.
    """


class MessageError(ApiError):
    """What lies under a Redis key is not the message that belongs there.

    Args:
        key: the Redis key (with the hash field in brackets where there is one).
        field: the message's field, dotted; empty when the whole is no JSON.
        value: what was found, shortened.
        remedy: what to do.
    """

    def __init__(self, key: str, field: str, value: str, remedy: str) -> None:
        self.key, self.field, self.value, self.remedy = key, field, value, remedy
        super().__init__(f"{key}: field {field or '(all)'} is {value}: {remedy}")


class ShardError(ApiError):
    """A shard's stream entry is corrupt, truncated or of an unknown version; `field` is the one that shows it."""

    def __init__(self, field: str, problem: str) -> None:
        self.field, self.problem = field, problem
        super().__init__(f"shard field {field}: {problem}")
