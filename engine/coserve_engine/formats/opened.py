"""Files of folders that others may write: opened as they lie there, never through a link, a pipe or a device, and read
to a bound, without torch.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

TEXT_BYTES = 1 << 20
"""Of a file of configuration or bookkeeping."""
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""O_NONBLOCK: a pipe without a writer would be waited for."""


def check_beneath(root: Path, path: Path) -> None:
    """Make sure that no folder on the way from `root` down to folder `path` is a link; `root` itself may be.

    Raises:
        OSError: one is, or is no folder, or `path` is not below `root`.
    """
    try:
        parts = path.relative_to(root).parts
    except ValueError:
        raise OSError(errno.EINVAL, f"is not below {root}", str(path)) from None
    place, folder = root, os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts:
            place /= part
            below = _open(part, _FOLDER, place, folder)
            os.close(folder)
            folder = below
    finally:
        os.close(folder)


@contextmanager
def opened(folder: Path, name: str) -> Iterator[IO[bytes]]:
    """A regular file right in `folder`, neither of which is a link.

    Raises:
        OSError: it is not there, or is something else.
    """
    path = folder / name
    if Path(name).name != name:
        raise OSError(errno.EINVAL, "is no name of a file in this folder", str(path))
    directory = _open(folder, _FOLDER, folder)
    try:
        number = _open(name, _FILE, path, directory)
    finally:
        os.close(directory)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    with os.fdopen(number, "rb") as file:
        yield file


def read_text(folder: Path, name: str, most_bytes: int = TEXT_BYTES) -> str:
    """The text of a file in `folder`.

    Raises:
        OSError: as of `opened`, or it is longer than `most_bytes`.
        ValueError: it is not UTF-8.
    """
    with opened(folder, name) as file:
        raw = file.read(most_bytes + 1)
    if len(raw) > most_bytes:
        raise OSError(errno.EFBIG, f"is longer than {most_bytes} bytes", str(folder / name))
    return raw.decode("utf-8")


def _open(name: str | Path, flags: int, path: Path, folder: int | None = None) -> int:
    try:
        return os.open(name, flags, dir_fd=folder)
    except OSError as error:
        if error.errno == errno.ELOOP or (error.errno == errno.ENOTDIR and path.is_symlink()):
            text = "is a link, and none is followed here: put what it means in its place (as cp -rL does)"
            raise OSError(errno.ELOOP, text, str(path)) from None
        raise
