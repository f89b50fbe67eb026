"""A shard as it lies in a Redis stream: binary arrays with a checksum each, so that a wrong byte is found and named.

Fields of the entry: v, seq, epoch, digest (text); tokens, weights, bounds, ids (little-endian int32, float32, int32,
int64); in version 2 turns (int32); crc. A shard whose turns are all 0 is written as version 1, which older agents read.
"""

from __future__ import annotations

import math
import re
import sys
import zlib
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from coserve_api.errors import ShardError

MAX_SHARD_BYTES = 64 * 2**20
_TEXT = ("v", "seq", "epoch", "digest")
_TEXT_BYTES = 128
"""More than these take."""
_ARRAYS = {"tokens": "i", "weights": "f", "bounds": "i", "ids": "q"}
_VERSIONS: Mapping[str, Mapping[str, str]] = {"1": _ARRAYS, "2": {**_ARRAYS, "turns": "i"}}
_INTEGER = re.compile(rb"0|[1-9][0-9]{0,15}")
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Sample:
    """One tokenised sample: `id` is its line in the data set (from 1), `weights[i]` multiplies the loss of predicting
    `tokens[i]`, `turn` tells the samples of one line apart.

    Weights go through float32.
    """

    id: int
    tokens: tuple[int, ...]
    weights: tuple[float, ...]
    turn: int = 0


@dataclass(frozen=True, slots=True)
class Shard:
    """The samples of optimizer step `seq` (from 1), from the `epoch`-th time through the data (from 0).

    `digest` is the sha256 of the tokenizer and chat template that made the tokens; the agent compares it with its own.
    """

    seq: int
    epoch: int
    digest: str
    samples: tuple[Sample, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens of all samples."""
        return sum(len(sample.tokens) for sample in self.samples)


def _to_bytes(code: str, values: array[Any]) -> bytes:
    if sys.byteorder == "big":
        values = array(code, values)
        values.byteswap()
    return values.tobytes()


def _from_bytes(name: str, code: str, data: bytes) -> array[Any]:
    values: array[Any] = array(code)
    if len(data) % values.itemsize:
        raise ShardError(name, f"has {len(data)} bytes, no multiple of {values.itemsize}")
    values.frombytes(data)
    if sys.byteorder == "big":
        values.byteswap()
    return values


def shard_bytes(samples: int, tokens: int) -> int:
    """What a shard takes in Redis, at most, with so many samples of so many tokens together."""
    return _TEXT_BYTES + 8 * tokens + 16 * samples + 4


def _names(version: str) -> tuple[str, ...]:
    return (*_TEXT, *_VERSIONS[version])


def _check(seq: int, fields: Mapping[str, bytes], names: tuple[str, ...]) -> bytes:
    """CRC-32 of each field, seeded with the shard's number and the field's name, so that swapped fields show too."""
    return "".join(f"{zlib.crc32(fields[name], zlib.crc32(f'{seq}:{name}'.encode())):08x}" for name in names).encode()


def encode_shard(shard: Shard) -> dict[str, bytes]:
    """The fields of the stream entry. ShardError for a shard that could not be decoded again."""
    _valid(shard)
    tokens, weights, bounds, ids, turns = array("i"), array("f"), array("i", [0]), array("q"), array("i")
    for sample in shard.samples:
        try:
            tokens.extend(sample.tokens)
            ids.append(sample.id)
            turns.append(sample.turn)
        except OverflowError:
            raise ShardError("tokens", f"sample {sample.id}: an id or a token is too large for its array") from None
        weights.extend(sample.weights)  # above float32's range: inf
        bounds.append(len(tokens))
    if not all(map(math.isfinite, weights)):
        raise ShardError("weights", "holds a weight beyond the range of float32")
    version = "2" if any(turns) else "1"
    fields = {
        "v": version.encode(),
        "seq": str(shard.seq).encode(),
        "epoch": str(shard.epoch).encode(),
        "digest": shard.digest.encode(),
        "tokens": _to_bytes("i", tokens),
        "weights": _to_bytes("f", weights),
        "bounds": _to_bytes("i", bounds),
        "ids": _to_bytes("q", ids),
    }
    if version == "2":
        fields["turns"] = _to_bytes("i", turns)
    size = sum(map(len, fields.values()))
    if size > MAX_SHARD_BYTES:
        remedy = "lower training.batchSize or dataset.maxSequenceLength"
        raise ShardError("tokens", f"shard {shard.seq} takes {size} bytes, above {MAX_SHARD_BYTES}: {remedy}")
    return {**fields, "crc": _check(shard.seq, fields, _names(version))}


def decode_shard(entry: Mapping[bytes, bytes]) -> Shard:
    """The shard of a stream entry; ShardError names the field that is missing, corrupt or of an unknown version."""
    fields = {name.decode("ascii", "replace"): value for name, value in entry.items()}
    version = fields.get("v", b"1").decode("ascii", "replace")
    if version not in _VERSIONS:
        raise ShardError("v", f"is {fields['v'][:40]!r}, and this program reads {' and '.join(_VERSIONS)}: update it")
    _check_version(version, fields)
    names = _names(version)
    for name in (*names, "crc"):
        if name not in fields:
            raise ShardError(name, "is missing: the entry is truncated or was written by something else")
    unknown = sorted(set(fields) - {*names, "crc"})
    if unknown:
        raise ShardError(unknown[0][:40], "is unknown: the entry was written by something else")
    for name in ("seq", "epoch"):
        if not _INTEGER.fullmatch(fields[name]):
            raise ShardError(name, f"is {fields[name][:40]!r}, not a number")
    seq = int(fields["seq"])
    crc, stored = _check(seq, fields, names), fields["crc"]
    if len(stored) != len(crc):
        raise ShardError("crc", f"has {len(stored)} bytes, not {len(crc)}")
    wrong = [name for i, name in enumerate(names) if crc[8 * i : 8 * i + 8] != stored[8 * i : 8 * i + 8]]
    if wrong:  # all of them at once: it is the number, which seeds them
        name = "seq" if len(wrong) == len(names) else wrong[0]
        raise ShardError(name, "does not match its checksum: the entry is corrupt")
    arrays = {name: _from_bytes(name, code, fields[name]) for name, code in _VERSIONS[version].items()}
    tokens, weights, bounds, ids = (arrays[name] for name in _ARRAYS)
    turns = arrays.get("turns", array("i", [0] * len(ids)))
    if len(weights) != len(tokens):
        raise ShardError("weights", f"has {len(weights)} entries for {len(tokens)} tokens")
    if len(bounds) != len(ids) + 1 or bounds[0] != 0 or bounds[-1] != len(tokens):
        raise ShardError("bounds", f"does not cut {len(tokens)} tokens into {len(ids)} samples")
    if len(turns) != len(ids):
        raise ShardError("turns", f"has {len(turns)} entries for {len(ids)} samples")
    cuts = (slice(*pair) for pair in pairwise(bounds))
    samples = tuple(
        Sample(id, tuple(tokens[cut]), tuple(weights[cut]), turn)
        for id, cut, turn in zip(ids, cuts, turns, strict=True)
    )
    shard = Shard(seq, int(fields["epoch"]), fields["digest"].decode(errors="replace"), samples)
    _valid(shard)
    return shard


def _check_version(version: str, fields: Mapping[str, bytes]) -> None:
    """Accuse the version, and not what else it would ask for, where all the rest is of another one."""
    for other in _VERSIONS.keys() - {version}:
        names = _names(other)
        if set(fields) == {*names, "crc"} and len(fields["crc"]) == 8 * len(names):
            raise ShardError("v", f"is {version}, and the entry is of version {other}: it is corrupt")


def _valid(shard: Shard) -> None:
    if shard.seq < 1 or shard.epoch < 0:
        raise ShardError("seq", f"is {shard.seq}, epoch {shard.epoch}: shards count from 1, epochs from 0")
    if not _DIGEST.fullmatch(shard.digest):
        raise ShardError("digest", "is no sha256 in hexadecimal")
    if not shard.samples:
        raise ShardError("ids", "is empty: a shard has at least one sample")
    for sample in shard.samples:
        if sample.turn < 0:
            raise ShardError("turns", f"sample {sample.id} has turn {sample.turn}: they count from 0")
        if not sample.tokens:
            raise ShardError("bounds", f"sample {sample.id} has no tokens")
        if len(sample.weights) != len(sample.tokens):
            raise ShardError(
                "weights", f"sample {sample.id} has {len(sample.tokens)} tokens, {len(sample.weights)} weights"
            )
        if min(sample.tokens) < 0:
            raise ShardError("tokens", f"sample {sample.id} holds {min(sample.tokens)}: token ids are not negative")
        if not all(map(math.isfinite, sample.weights)):
            raise ShardError("weights", f"sample {sample.id} has a weight that is not finite")
