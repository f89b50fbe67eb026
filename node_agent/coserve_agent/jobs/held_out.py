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

from coserve_agent.errors import JobFailedError
from coserve_api.errors import ShardError
from coserve_api.job_status import FailedReason
from coserve_contract.messages import FeedStatus
from coserve_contract.packed import pack, read_head, read_packed
from coserve_contract.shards import Sample, Shard

NAME = "held_out.shards"
_PART = re.compile(r"\.held_out\.e[0-9]+")


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
        except (SpoolError, ShardError, OSError):
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
            file.writelines(map(pack, shards))

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
        except (SpoolError, ShardError, OSError) as error:
            raise JobFailedError(
                FailedReason.ARTIFACT_STORE_ERROR, f"the held-out samples in {self._path} do not read: {error}"
            ) from None

    def _read(self) -> Iterator[Shard]:
        with self._path.open("rb") as file:
            if read_head(file) != self._head:
                raise SpoolError("it is of other data")
            for number in range(1, self.shards + 1):
                shard = read_packed(file)
                if shard.seq != number:
                    raise SpoolError(f"shard {shard.seq} stands where {number} is next")
                yield shard
            if file.read(1):
                raise SpoolError("more follows its last shard")
