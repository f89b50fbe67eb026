"""The files of a data set, line by line: JSON Lines, plain or compressed by gzip, and Parquet, a line for each row.

What a file is, its first bytes say. Lines are found again by their place in the file; of a file whose lines have none
(compressed, or columns) the first reading leaves a copy as plain lines in a temporary file, so that memory grows
neither with the file nor with its longest line.
"""

from __future__ import annotations

import errno
import gzip
import json
import math
import re
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from coserve_agent.errors import DatasetError
from coserve_api.job_status import FailedReason

MAX_LINE_BYTES = 16 << 20
KNOWN = (".jsonl", ".jsonl.gz", ".parquet")
"""Names that a folder's files are taken by. A file that is named itself may be called anything."""
_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
_CHUNK_BYTES = 1 << 16
_PARQUET_ROWS = 256
"""Rows of a Parquet file that are in memory at once, beside the row group's pages."""


@dataclass(frozen=True, slots=True)
class Line:
    """`number` counts from 1; `offset` is where `read` finds it; `raw` is None where it is longer than
    MAX_LINE_BYTES.
    """

    number: int
    offset: int
    raw: bytes | None


class DataFile:
    """One file. `path` is what it is called, `_place` where it lies.

    Raises (all methods):
        DatasetError: it cannot be read.
    """

    def __init__(self, path: Path, place: Path) -> None:
        self.path, self._place = path, place
        self._copy: IO[bytes] | None = None

    def lines(self) -> Iterator[Line]:
        """All lines, blank ones included. The first reading must come to its end before `read`."""
        try:
            with self._place.open("rb") as file:
                magic = file.read(4)
                file.seek(0)
                if magic.startswith(_GZIP):
                    self._unpack(lambda copy: _unpack_gzip(self.path, file, copy))
                elif magic == _PARQUET:
                    self._unpack(lambda copy: _write_rows(self.path, file, copy))
                yield from _split(self._copy or file)
        except OSError as error:
            raise _unreadable(self.path, error) from None

    def read(self, offset: int) -> bytes:
        """The line at `offset`, as `lines` gave it if the file is still the same."""
        try:
            if self._copy is not None:
                return _line_at(self._copy, offset)
            with self._place.open("rb") as file:
                return _line_at(file, offset)
        except OSError as error:
            raise _unreadable(self.path, error) from None

    def _unpack(self, unpack: Callable[[IO[bytes]], None]) -> None:
        """Make the copy, whole: what is damaged shows by its end."""
        copy = tempfile.TemporaryFile()  # noqa: SIM115 (it is there as long as this object)
        weakref.finalize(self, copy.close)
        try:
            unpack(copy)
            copy.seek(0)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise DatasetError(
                FailedReason.INVALID_DATASET,
                f"{self.path}: takes more room unpacked than {tempfile.gettempdir()} has; write it as plain .jsonl",
            ) from None
        self._copy = copy


def find(path: Path, root: Path) -> tuple[list[DataFile], list[str]]:
    """The files that `path` names (a file, a folder, or a pattern with * and ?), in the order of their names; and the
    names of those in a folder that are left alone.

    Args:
        root: the volume, which no link may lead out of.

    Raises:
        DatasetError: there are none, or one lies elsewhere.
    """
    left: list[str] = []
    try:
        if path.is_dir():
            found = sorted(one for one in path.iterdir() if not one.name.startswith(".") and not one.is_dir())
            left = [one.name for one in found if not one.name.endswith(KNOWN)]
            found = [one for one in found if one.name.endswith(KNOWN)]
            nothing = f"is a folder without {', '.join(KNOWN)} files; name a file, or the folder that has them"
        elif any(mark in str(path) for mark in "*?"):
            found = sorted(_matching(path))
            nothing = "matches no file; check dataset.uri and what the volume holds"
        else:
            found, nothing = [path], ""
    except OSError as error:
        raise _unreadable(path, error) from None
    if not found:
        raise DatasetError(FailedReason.DATASET_NOT_FOUND, f"{path}: {nothing}")
    return [DataFile(one, _inside(one, root)) for one in found], left


def _matching(pattern: Path) -> Iterator[Path]:
    """The files of a pattern; a name that begins with a dot is not meant by a mark, as in a shell."""
    anchor = Path(pattern.anchor)
    parts = [re.sub(r"\*+", "*", part) for part in pattern.relative_to(anchor).parts]
    for one in anchor.glob("/".join(parts)):
        names = one.parts[-len(parts) :]
        hidden = any(name.startswith(".") and part[0] in "*?" for name, part in zip(names, parts, strict=True))
        if not hidden and not one.is_dir():
            yield one


def _inside(path: Path, root: Path) -> Path:
    """Where `path` really lies."""
    try:
        place = path.resolve(strict=True)
    except (OSError, RuntimeError):  # the latter: links in a circle
        what = "no such file; check dataset.uri and what the volume holds"
        raise DatasetError(FailedReason.DATASET_NOT_FOUND, f"{path}: {what}") from None
    if not place.is_relative_to(root.resolve()):
        what = f"lies outside of the volume {root}, maybe by a link; put the file itself there"
        raise DatasetError(FailedReason.DATASET_NOT_FOUND, f"{path}: {what}")
    if not place.is_file():
        raise DatasetError(FailedReason.DATASET_NOT_FOUND, f"{path}: is no regular file; name one")
    return place


def _split(file: IO[bytes]) -> Iterator[Line]:
    number = offset = 0
    while raw := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(raw) <= MAX_LINE_BYTES or raw.endswith(b"\n"):
            yield Line(number, offset, raw)
            offset += len(raw)
            continue
        offset += len(raw)
        del raw  # before more of it is read
        offset += _rest_of_line(file)
        yield Line(number, offset, None)


def _rest_of_line(file: IO[bytes]) -> int:
    """Read to the end of a line; returns its bytes."""
    size = 0
    while more := file.readline(_CHUNK_BYTES):
        size += len(more)
        if more.endswith(b"\n"):
            break
    return size


def _line_at(file: IO[bytes], offset: int) -> bytes:
    file.seek(offset)
    return file.readline(MAX_LINE_BYTES + 1)


def _unpack_gzip(path: Path, file: IO[bytes], copy: IO[bytes]) -> None:
    try:
        with gzip.open(file) as unpacked:
            shutil.copyfileobj(unpacked, copy)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(path, "gzip", error) from None


def _write_rows(path: Path, file: IO[bytes], copy: IO[bytes]) -> None:
    """Each row of a Parquet file as a line of JSON."""
    try:
        import pyarrow  # noqa: PLC0415 (large, and only this kind of file needs it)
        import pyarrow.parquet  # noqa: PLC0415
    except ImportError as error:
        raise DatasetError(
            FailedReason.INVALID_DATASET,
            f"{path}: is a Parquet file, and this image has no pyarrow to read it with ({error}); write .jsonl, or use "
            "an image with pyarrow",
        ) from None
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(_PARQUET_ROWS):
            for row in batch.to_pylist():
                line = json.dumps(_plain(row), ensure_ascii=False, default=_no_json)
                copy.write(line.encode("utf-8", "surrogatepass") + b"\n")
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's; what pyarrow itself finds has no number
        raise _damaged(path, "Parquet", error) from None


def _plain(value: Any) -> Any:
    """`value` without what columns need and rows do not: a struct's field that is null is not there, and neither is
    NaN, which pandas writes for a missing value.
    """
    if isinstance(value, dict):
        fields = ((name, _plain(one)) for name, one in value.items())
        return {name: one for name, one in fields if one is not None}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _no_json(value: object) -> object:
    """A column of bytes is text in files of old writers; dates, decimals and the like are no text, and do not become
    it.
    """
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            pass
    return {"type": type(value).__name__}


def _damaged(path: Path, kind: str, error: Exception) -> DatasetError:
    # What pyarrow says may quote a value.
    what = type(error).__name__ if kind == "Parquet" else " ".join(str(error).split())[:200]
    return DatasetError(FailedReason.INVALID_DATASET, f"{path}: is damaged or cut off ({kind}: {what}); copy it again")


def _unreadable(path: Path, error: OSError) -> DatasetError:
    return DatasetError(
        FailedReason.DATASET_NOT_FOUND,
        f"{path}: cannot be read ({error.strerror}); check the volume and its permissions",
    )
