"""Errors in the words of the API by which a request came: what is one request inside has other names outside."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from coserve_agent.http.errors import ApiError

_QUOTED = r"(?<!\w)'[^']*'"


@contextmanager
def renaming(fields: Mapping[str, str]) -> Iterator[None]:
    """Raises ApiError with `fields`, by their names inside, as clients know them; what is quoted stays as it is."""
    try:
        yield
    except ApiError as error:
        names = "|".join(re.escape(name) for name in sorted(fields, key=len, reverse=True))
        pattern = re.compile(rf"{_QUOTED}|(?:(?<![\w.])|(?=\]))(?:{names})(?!\w)")
        message = pattern.sub(lambda found: fields.get(found[0], found[0]), str(error))
        param = None if error.param is None else fields.get(error.param, error.param).partition(".")[0]
        raise ApiError(error.status, message, param=param, code=error.code, retry_after_s=error.retry_after_s) from None
