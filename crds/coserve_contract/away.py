"""What says that the state of jobs cannot be reached now, whichever backend keeps it: try again later."""

from __future__ import annotations

from redis.exceptions import RedisError


class StoreAwayError(OSError):
    """The local store cannot be read or written now: it is locked, or its disk is full or broken."""


STORE_AWAY = (RedisError, OSError)
"""What callers catch; TimeoutError is an OSError."""
