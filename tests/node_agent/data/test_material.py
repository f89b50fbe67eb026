"""From usable lines to shards: a line's samples stay together, what is left out is counted, and what could not be
trained is refused before the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from data_rows import TURNS, EachAnswer, write

from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.data import material as material_module
from coserve_agent.data.material import Material
from coserve_agent.data.rendering import Renderer
from coserve_agent.errors import DatasetError, StartError
from coserve_agent.model.vocabulary import vocab_size
from coserve_agent.settings import FeederSettings
from coserve_api.job import DatasetFormat, Learn, OnInvalid
from coserve_api.job_status import FailedReason
from coserve_contract.messages import FeedStatus
from coserve_contract.shards import MAX_SHARD_BYTES, Shard, decode_shard, encode_shard, shard_bytes

Prepare = Callable[..., Material]


def conversation(answers: int, word: str = "one") -> dict[str, Any]:
    """A row with so many answers, the last of them the longest context."""
    pair = [{"role": "user", "content": word}, {"role": "assistant", "content": "two"}]
    return {"messages": pair * answers}


@pytest.fixture
def prepare(tmp_path: Path, tokenizer: Tokenizer) -> Prepare:
    """Material of the rows in tmp_path/data.jsonl."""

    def make(renderer: type[Renderer] = Renderer, **changes: Any) -> Material:
        fields: dict[str, Any] = {
            "redis_url": "redis://127.0.0.1:1/0",
            "endpoint_uid": "e",
            "job_uid": "j",
            "job_name": "job",
            "dataset_path": tmp_path / "data.jsonl",
            "dataset_root": tmp_path,
            "model_path": tmp_path,
            "eval_percent": 0,
            "max_sequence_length": 64,
            "batch_size": 4,
            "epochs": 1,
        }
        return Material.prepare(FeederSettings(**fields | changes), renderer(tokenizer, (3,)), tokenizer.size)

    return make


# ---- several samples of a line ----


def test_a_lines_samples_stay_together(tmp_path: Path, prepare: Prepare) -> None:
    write(tmp_path, *(conversation(1 + n % 3) for n in range(20)))
    one, several = prepare(), prepare(EachAnswer, eval_percent=30, batch_size=3, epochs=2)
    assert all(len(one.dataset.samples((id,))) == 1 for id in one.dataset.ids)
    held_out = {sample.id for n in range(several.eval_shards) for sample in several.eval_shard(n + 1).samples}
    trained = set()
    for step in range(1, several.train.total_steps + 1):
        shard = several.shard(step)
        assert tuple(dict.fromkeys(sample.id for sample in shard.samples)) == several.train.batch(step)
        for id in several.train.batch(step):
            turns = [sample.turn for sample in shard.samples if sample.id == id]
            assert turns == list(range(1 + (id - 1) % 3)), "all answers of a line, in one step"
        trained |= {sample.id for sample in shard.samples}
    assert len(held_out) == 6
    assert not held_out & trained
    # The order is of lines: as many samples as a line may have, the steps are the same.
    assert [prepare(batch_size=3).train.batch(n) for n in range(1, 8)] == [
        prepare(EachAnswer, batch_size=3).train.batch(n) for n in range(1, 8)
    ]


def test_what_several_sequences_cost_is_said(tmp_path: Path, prepare: Prepare) -> None:
    write(tmp_path, *(conversation(3) for _ in range(4)))
    one, several = prepare().status(), prepare(EachAnswer).status()
    assert (one.samples, one.sequences) == (4, 4)
    assert (several.samples, several.sequences) == (4, 12)
    assert one.tokens < several.tokens == sum(len(s.tokens) for s in prepare(EachAnswer).shard(1).samples)


def test_a_turn_that_is_too_long_is_refused_alone(tmp_path: Path, prepare: Prepare) -> None:
    """One answer of `conversation` takes some ten tokens of context, so a limit cuts the later ones off."""
    write(tmp_path, conversation(1), conversation(4), conversation(1, "one " * 30))
    limit = len(prepare(max_sequence_length=256).dataset.samples((1,))[0].tokens) * 2
    made = prepare(EachAnswer, max_sequence_length=limit, on_invalid=OnInvalid.SKIP)
    assert made.dataset.ids == (1, 2)
    assert [sample.turn for sample in made.dataset.samples((2,))] == [0, 1]
    status = made.status()
    assert (status.skipped_lines, status.skipped_turns, status.skipped) == (1, 2, {"TooManyTokens": 3})
    assert [(one.line, one.message.partition(",")[0]) for one in status.refusals] == [
        (2, f"turn 2 has {limit // 2 * 3} tokens"),
        (2, f"turn 3 has {limit // 2 * 4} tokens"),
        (3, status.refusals[2].message.partition(",")[0]),
    ]
    with pytest.raises(DatasetError, match=r"line 2: turn 2 has .* more than dataset.maxSequenceLength"):
        prepare(EachAnswer, max_sequence_length=limit)


def test_dataset_learn_reaches_the_samples(tmp_path: Path, prepare: Prepare) -> None:
    write(tmp_path, {"messages": TURNS})
    every, last = (prepare(learn=learn).dataset.samples((1,))[0] for learn in Learn)
    assert every.tokens == last.tokens
    assert sum(last.weights) < sum(every.weights)


# ---- what is left out ----


def test_what_is_left_out_is_counted_and_the_first_are_named(tmp_path: Path, prepare: Prepare) -> None:
    good = {**conversation(1), "source": "x", "id\n" + "x" * 100: 1}
    bad = [b"{", {"messages": [{"role": "user", "content": "a\ud83d"}]}, {"messages": 5}]
    write(tmp_path, good, *bad * 5, good)
    status = prepare(on_invalid=OnInvalid.SKIP).status()
    assert (status.samples, status.skipped_lines) == (2, 15)
    assert status.skipped == {"NotJson": 5, "HalfCharacter": 5, "InvalidField": 5}
    assert [one.line for one in status.refusals] == list(range(2, 12))
    assert status.refusals[1].reason == "HalfCharacter"
    assert status.unknown_fields == {"source": 2, "(other names)": 2}
    assert FeedStatus.loads("key", status.dumps()) == status


def test_names_of_fields_are_bounded(tmp_path: Path, prepare: Prepare) -> None:
    write(tmp_path, *({**conversation(1), f"field{n}": n} for n in range(100)))
    status = prepare().status()
    assert len(status.unknown_fields) == 33
    assert status.unknown_fields["(other names)"] == 68
    assert sum(status.unknown_fields.values()) == 100


def test_files_that_are_not_read_are_named(tmp_path: Path, prepare: Prepare) -> None:
    write(tmp_path, conversation(1))
    for n in range(7):
        (tmp_path / f"{n}.csv").write_text("x")
    status = prepare(dataset_path=tmp_path).status()
    assert status.notes == ("files of the folder that were not read: 0.csv, 1.csv, 2.csv, 3.csv, 4.csv and 2 more",)
    assert any("0.csv" in line for line in prepare(dataset_path=tmp_path).report())


# ---- refused before the first step ----


@pytest.mark.parametrize("length", [{"epochs": 2}, {"epochs": None, "max_steps": 6}])
def test_a_warm_up_that_never_ends_is_refused(tmp_path: Path, prepare: Prepare, length: dict[str, int]) -> None:
    """Of 12 lines 2 epochs are 6 steps of 4 lines."""
    write(tmp_path, *(conversation(1) for _ in range(12)))
    prepare(warmup_steps=5, **length).check_schedule()
    for steps in (6, 7):
        with pytest.raises(DatasetError, match=rf"training.warmupSteps is {steps}, and the job has 6 steps") as caught:
            prepare(warmup_steps=steps, **length).check_schedule()
        assert caught.value.reason is FailedReason.INVALID_DATASET


def test_a_step_over_the_shard_limit_is_refused(
    tmp_path: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit lies between the largest step and the one below, so that each step has to be looked at."""
    write(tmp_path, *(conversation(1 + n % 5, "one " * (n % 3)) for n in range(30)))
    made = prepare(batch_size=4, eval_percent=20, epochs=3)
    shards = {f"the shard of step {n}": made.shard(n) for n in range(1, made.train.total_steps + 1)}
    shards |= {f"held-out shard {n}": made.eval_shard(n) for n in range(1, made.eval_shards + 1)}
    sizes = {name: shard_bytes(len(shard.samples), shard.tokens) for name, shard in shards.items()}
    largest = max(sizes.values())
    monkeypatch.setattr(material_module, "MAX_SHARD_BYTES", largest)
    assert prepare(batch_size=4, eval_percent=20, epochs=3).status() == made.status()
    monkeypatch.setattr(material_module, "MAX_SHARD_BYTES", largest - 1)
    first = next(name for name, size in sizes.items() if size == largest)
    words = rf"{first} would take {largest} bytes \(4 lines, {shards[first].tokens} tokens\).*lower training.batchSize"
    with pytest.raises(DatasetError, match=words):
        prepare(batch_size=4, eval_percent=20, epochs=3)


def test_the_size_that_is_checked_is_never_below_the_one_that_counts(tmp_path: Path, prepare: Prepare) -> None:
    write(tmp_path, *(conversation(1 + n % 5) for n in range(30)))
    for renderer in (Renderer, EachAnswer):
        shard = prepare(renderer).shard(1)
        stored = sum(map(len, encode_shard(shard).values())) - len(encode_shard(shard)["crc"])
        assert stored <= shard_bytes(len(shard.samples), shard.tokens) < stored + 512
        entry = {name.encode(): value for name, value in encode_shard(shard).items()}
        assert decode_shard(entry) == shard
    assert shard_bytes(1, 1) < MAX_SHARD_BYTES


# ---- digests ----


def test_three_digests(tmp_path: Path, prepare: Prepare, plain_tokenizer: Tokenizer) -> None:
    write(tmp_path, {"messages": TURNS})
    made = prepare().status()
    assert prepare().status() == made
    assert prepare(format=DatasetFormat.MESSAGES).status() == made, "found or given, it is the same format"
    last = prepare(learn=Learn.LAST).status()
    assert (last.digest, last.content) == (made.digest, made.content)
    assert last.rendering != made.rendering

    class Otherwise(Renderer):
        def __init__(self, tokenizer: Tokenizer, ends: Sequence[int]) -> None:
            super().__init__(plain_tokenizer, ends)

    other = prepare(Otherwise).status()
    assert (other.rendering, other.content) == (made.rendering, made.content)
    assert other.digest != made.digest
    write(tmp_path, {"messages": [TURNS[0], {**TURNS[1], "content": "tow"}, *TURNS[2:]]})
    changed = prepare().status()
    assert (changed.digest, changed.rendering) == (made.digest, made.rendering)
    assert changed.content != made.content


# ---- the model's vocabulary ----


def test_the_vocabulary_is_read_without_torch(model_folder: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert vocab_size(model_folder) == tokenizer.size
    for content, words in (
        (None, "config.json: not readable"),
        ("{", "not readable as JSON"),
        ("[]", "vocab_size is None"),
        ('{"vocab_size": "x"}', "vocab_size is 'x'; it must be a whole number"),
        ('{"vocab_size": true}', "vocab_size is True"),
    ):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(StartError, match=words):
            vocab_size(tmp_path)


def test_shards_of_one_sample_a_line_are_what_older_agents_read(tmp_path: Path, prepare: Prepare) -> None:
    write(tmp_path, *(conversation(3) for _ in range(4)))
    one, several = prepare().shard(1), prepare(EachAnswer).shard(1)
    assert isinstance(one, Shard)
    assert (encode_shard(one)["v"], encode_shard(several)["v"]) == (b"1", b"2")
