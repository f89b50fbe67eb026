"""A job's held-out samples as a file in its folder, so that they go through Redis once, a window at a time.

The holder of the lease writes it. A line says of which data it is; then each shard as it lay in Redis, with its
checksums. It counts once it has its name, which the last shard gives it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from coserve_agent.errors import JobFailedError
from coserve_api.errors import ShardError
from coserve_api.job_status import FailedReason
from coserve_contract.messages import FeedStatus
from coserve_contract.shards import MAX_SHARD_BYTES, Sample, Shard, decode_shard, encode_shard

NAME = "held_out.shards"
_PART = re.compile(r"\.held_out\.e[0-9]+")
_LONGEST_HEAD = 4096


class SpoolError(Exception):
    """The file is not whole, or of other data."""


class HeldOut:
    """The file of one job, in `folder`, for the holder of `epoch`. All methods block.

    Args:
        feed: what the feeder says of the data.
    """

    def __init__(self, folder: Path, epoch: int, feed: FeedStatus) -> None:
        self.shards = feed.eval_shards
        self._path = folder / NAME
        self._part = folder / f".held_out.e{epoch}"
        self._head = {
            "shards": feed.eval_shards,
            "digest": feed.digest,
            "rendering": feed.rendering,
            "content": feed.content,
        }

    def is_whole(self) -> bool:
        """Whether all of it is there; each checksum is compared."""
        try:
            for _ in self._read():
                pass
        except (SpoolError, OSError):
            return False
        return True

    def begin(self) -> None:
        """Write it anew. OSError."""
        self._part.parent.mkdir(parents=True, exist_ok=True)
        for one in self._part.parent.iterdir():
            if _PART.fullmatch(one.name):
                one.unlink(missing_ok=True)
        self._part.write_bytes(json.dumps(self._head).encode() + b"\n")

    def append(self, shards: Iterable[Shard]) -> None:
        """Add the next shards. OSError."""
        with self._part.open("ab") as file:
            for shard in shards:
                fields = encode_shard(shard)
                head = {name: len(value) for name, value in fields.items()}
                file.write(json.dumps(head).encode() + b"\n")
                file.writelines(fields.values())

    def finish(self) -> None:
        """All shards were added. OSError."""
        with self._part.open("rb") as file:
            os.fsync(file.fileno())
        self._part.replace(self._path)

    def remove(self) -> None:
        """The job needs it no more. OSError."""
        self._path.unlink(missing_ok=True)

    def samples(self) -> Iterator[Sample]:
        """All samples, a shard in memory at a time. JobFailedError: it does not read (any more)."""
        try:
            for shard in self._read():
                yield from shard.samples
        except (SpoolError, OSError) as error:
            raise JobFailedError(
                FailedReason.ARTIFACT_STORE_ERROR, f"the held-out samples in {self._path} do not read: {error}"
            ) from None

    def _read(self) -> Iterator[Shard]:
        with self._path.open("rb") as file:
            if _head(file) != self._head:
                raise SpoolError("it is of other data")
            for number in range(1, self.shards + 1):
                shard = _shard(file)
                if shard.seq != number:
                    raise SpoolError(f"shard {shard.seq} stands where {number} is next")
                yield shard
            if file.read(1):
                raise SpoolError("more follows its last shard")


def _head(file: IO[bytes]) -> dict[str, object]:
    line = file.readline(_LONGEST_HEAD)
    try:
        head = json.loads(line)
    except ValueError:
        raise SpoolError("it is cut off, or was written by something else") from None
    return head if isinstance(head, dict) and line.endswith(b"\n") else {}


def _shard(file: IO[bytes]) -> Shard:
    fields = {}
    for name, size in _head(file).items():
        if not isinstance(size, int) or not 0 <= size <= MAX_SHARD_BYTES:
            raise SpoolError("the size of a field is damaged")
        fields[name.encode()] = file.read(size)
    try:
        return decode_shard(fields)
    except ShardError as error:
        raise SpoolError(str(error)) from None
