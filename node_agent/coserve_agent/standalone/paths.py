"""Where the data of a standalone job lie: a path of this machine, below the folders that the server may read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from coserve_api.errors import InvalidValueError

SCHEME = "file://"
EVERYWHERE = Path("/")


def data_path(uri: str) -> Path:
    """The file, folder or pattern that a URI or a plain path names."""
    return Path(uri.removeprefix(SCHEME))


def _check(uri: str) -> str:
    path = data_path(uri)
    if not path.is_absolute() or ".." in path.parts or "\0" in uri:
        raise InvalidValueError(
            f"{uri[:200]!r} must be an absolute path of this machine, or file:// and one, without '..': a file of JSON "
            "Lines or Parquet, a folder, or a pattern with * and ?"
        )
    return uri


LocalUri = Annotated[str, Field(max_length=4096), AfterValidator(_check)]


def root_of(uri: str, roots: Sequence[Path]) -> Path:
    """The folder of `roots` that the data are below, and that no link may lead out of; with none, any path will do.

    Raises:
        InvalidValueError: it is below none of them.
    """
    if not roots:
        return EVERYWHERE
    try:
        place = data_path(uri).resolve()
    except (OSError, RuntimeError) as error:  # the latter: links in a circle
        raise InvalidValueError(f"{uri[:200]!r} does not lead anywhere ({error}); name another") from None
    for root in roots:
        if place.is_relative_to(root.resolve()):
            return root
    raise InvalidValueError(
        f"{uri[:200]!r} lies outside of what this server may read ({', '.join(map(str, roots))}): put the file there, "
        "or name its folder in COSERVE_DATA_ROOTS"
    )
