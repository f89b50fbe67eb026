"""A shard as bytes in a row, for files and tables: a line with the length of each field, then the fields with their
checksums, as they lie in a Redis stream.
"""

from __future__ import annotations

import json
from typing import IO

from coserve_api.errors import ShardError
from coserve_contract.shards import MAX_SHARD_BYTES, Shard, decode_shard, encode_shard

_LONGEST_HEAD = 4096


def pack(shard: Shard) -> bytes:
    """ShardError for one that could not be read again."""
    fields = encode_shard(shard)
    head = json.dumps({name: len(value) for name, value in fields.items()}).encode()
    return b"\n".join((head, b"".join(fields.values())))


def read_packed(file: IO[bytes]) -> Shard:
    """The next shard of a file; ShardError where it is cut off or damaged."""
    fields = {}
    for name, size in read_head(file).items():
        if not isinstance(size, int) or not 0 <= size <= MAX_SHARD_BYTES:
            raise ShardError(name[:40], f"has the length {size!r:.40}: it is damaged")
        fields[name.encode()] = file.read(size)
    return decode_shard(fields)


def read_head(file: IO[bytes]) -> dict[str, object]:
    """A line that says what follows; ShardError for anything else."""
    line = file.readline(_LONGEST_HEAD)
    try:
        head = json.loads(line)
    except ValueError:
        raise ShardError("head", "is cut off, or was written by something else") from None
    return head if isinstance(head, dict) and line.endswith(b"\n") else {}
