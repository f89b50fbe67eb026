"""Shards survive the way through Redis byte for byte, and no wrong byte does."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coserve_api.errors import ShardError
from coserve_contract.shards import MAX_SHARD_BYTES, Sample, Shard, decode_shard, encode_shard

DIGEST = "0123456789abcdef" * 4

samples = st.integers(1, 12).flatmap(
    lambda n: st.builds(
        Sample,
        id=st.integers(0, 2**62),
        tokens=st.tuples(*[st.integers(0, 2**31 - 1)] * n),
        weights=st.tuples(*[st.floats(width=32, allow_nan=False, allow_infinity=False)] * n),
        turn=st.just(0) | st.integers(0, 2**31 - 1),
    )
)
shards = st.builds(
    Shard,
    seq=st.integers(1, 2**40),
    epoch=st.integers(0, 1000),
    digest=st.text("0123456789abcdef", min_size=64, max_size=64),
    samples=st.lists(samples, min_size=1, max_size=4).map(tuple),
)


def entry(shard: Shard) -> dict[bytes, bytes]:
    return {name.encode(): value for name, value in encode_shard(shard).items()}


SHARD = Shard(3, 1, DIGEST, (Sample(7, (1, 2, 3), (0.0, 1.0, 0.5)), Sample(9, (4,), (1.0,))))
OLD_CRC = b"c29d365f66df5b9f16b67c74d78fed04ce67db61feb7947adc3d0f5ec72d4552"
TURNS = Shard(3, 1, DIGEST, (Sample(7, (1, 2, 3), (0.0, 1.0, 0.5), 2), Sample(7, (4,), (1.0,), 3)))


@given(shards)
def test_a_shard_comes_back_as_it_was(shard: Shard) -> None:
    assert decode_shard(entry(shard)) == shard


@settings(max_examples=300)
@given(shards, st.data())
def test_any_wrong_byte_is_found(shard: Shard, data: st.DataObject) -> None:
    fields = entry(shard)
    name = data.draw(st.sampled_from(sorted(fields)))
    where = data.draw(st.integers(0, len(fields[name]) - 1))
    flip = data.draw(st.integers(1, 255))
    broken = bytearray(fields[name])
    broken[where] ^= flip
    with pytest.raises(ShardError) as caught:
        decode_shard({**fields, name: bytes(broken)})
    if name != b"crc":  # a wrong checksum accuses the field it belongs to
        assert caught.value.field == name.decode()


@pytest.mark.parametrize(
    ("shard", "name"), [(shard, name) for shard in (SHARD, TURNS) for name in sorted(encode_shard(shard))]
)
def test_every_truncation_is_found(shard: Shard, name: str) -> None:
    fields = entry(shard)
    whole = fields[name.encode()]
    for length in range(len(whole)):
        with pytest.raises(ShardError) as caught:
            decode_shard({**fields, name.encode(): whole[:length]})
        assert caught.value.field == name
    del fields[name.encode()]
    with pytest.raises(ShardError, match=f"shard field {name}: is missing"):
        decode_shard(fields)


def test_the_bytes_are_little_endian_whatever_the_machine() -> None:
    fields = encode_shard(SHARD)
    assert fields["tokens"] == b"\1\0\0\0\2\0\0\0\3\0\0\0\4\0\0\0"
    assert fields["weights"] == b"\0\0\0\0\0\0\x80\x3f\0\0\0\x3f\0\0\x80\x3f"
    assert fields["bounds"] == b"\0\0\0\0\3\0\0\0\4\0\0\0"
    assert fields["ids"] == b"\7\0\0\0\0\0\0\0\t\0\0\0\0\0\0\0"


def test_a_shard_without_turns_is_what_it_was_before_there_were_any() -> None:
    """Bytes of version 1, as they were written before version 2 was there."""
    assert encode_shard(SHARD) == {
        "v": b"1", "seq": b"3", "epoch": b"1", "digest": DIGEST.encode(),
        "tokens": b"\1\0\0\0\2\0\0\0\3\0\0\0\4\0\0\0", "weights": b"\0\0\0\0\0\0\x80\x3f\0\0\0\x3f\0\0\x80\x3f",
        "bounds": b"\0\0\0\0\3\0\0\0\4\0\0\0", "ids": b"\7\0\0\0\0\0\0\0\t\0\0\0\0\0\0\0",
        "crc": OLD_CRC,
    }  # fmt: skip
    assert [sample.turn for sample in decode_shard(entry(SHARD)).samples] == [0, 0]


def test_turns_make_it_version_2() -> None:
    fields = encode_shard(TURNS)
    assert (fields["v"], fields["turns"]) == (b"2", b"\2\0\0\0\3\0\0\0")


def test_fields_of_two_shards_do_not_mix() -> None:
    other = Shard(4, 1, DIGEST, SHARD.samples)
    with pytest.raises(ShardError, match="weights: does not match its checksum"):
        decode_shard({**entry(SHARD), b"weights": b"\0" * 16})
    with pytest.raises(ShardError, match="seq: does not match its checksum"):
        decode_shard({**entry(SHARD), b"crc": entry(other)[b"crc"]})


def test_a_later_version_is_named_before_anything_else() -> None:
    with pytest.raises(ShardError, match="v: is b'3', and this program reads 1 and 2: update it"):
        decode_shard({b"v": b"3", b"other": b""})


def test_a_foreign_field_is_named() -> None:
    with pytest.raises(ShardError, match="field extra: is unknown"):
        decode_shard({**entry(SHARD), b"extra": b""})


@pytest.mark.parametrize(
    ("shard", "field"),
    [
        (Shard(0, 0, DIGEST, SHARD.samples), "seq"),
        (Shard(1, 0, "no digest", SHARD.samples), "digest"),
        (Shard(1, 0, DIGEST, ()), "ids"),
        (Shard(1, 0, DIGEST, (Sample(1, (), ()),)), "bounds"),
        (Shard(1, 0, DIGEST, (Sample(1, (1, 2), (1.0,)),)), "weights"),
        (Shard(1, 0, DIGEST, (Sample(1, (-1,), (1.0,)),)), "tokens"),
        (Shard(1, 0, DIGEST, (Sample(1, (2**31,), (1.0,)),)), "tokens"),
        (Shard(1, 0, DIGEST, (Sample(1, (1,), (float("nan"),)),)), "weights"),
        (Shard(1, 0, DIGEST, (Sample(1, (1,), (1e39,)),)), "weights"),
        (Shard(1, 0, DIGEST, (Sample(1, (1,), (1.0,), -1),)), "turns"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(shard: Shard, field: str) -> None:
    with pytest.raises(ShardError) as caught:
        encode_shard(shard)
    assert caught.value.field == field


def test_a_shard_that_redis_could_not_take_names_the_remedy() -> None:
    tokens = (1,) * (MAX_SHARD_BYTES // 8)
    with pytest.raises(ShardError, match=r"lower training\.batchSize or dataset\.maxSequenceLength"):
        encode_shard(Shard(1, 0, DIGEST, (Sample(1, tokens, (1.0,) * len(tokens)),)))
