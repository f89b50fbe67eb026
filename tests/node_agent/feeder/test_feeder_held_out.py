"""Which samples a feeder holds out, and of which file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from feeding import prepared, write

from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.data.material import Material
from coserve_agent.errors import DatasetError


def test_one_line_cannot_be_held_out(variables: dict[str, object], tokenizer: Tokenizer, data: Path) -> None:
    write(data, '{"text": "one"}\n')
    with pytest.raises(DatasetError, match=r"of 1 usable lines none .* dataset.evalPercent is 10; add lines"):
        prepared(tokenizer, variables)
    alone = prepared(tokenizer, variables, eval_percent=0)
    assert alone.status().samples == 1


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    path = tmp_path / "held-out.jsonl"
    path.write_text("".join(json.dumps({"text": f"held out {n}"}) + "\n" for n in range(9)))
    return path


def prepare(variables: dict[str, object], tokenizer: Tokenizer, **changes: object) -> Material:
    return prepared(tokenizer, variables, eval_root=variables["dataset_root"], **changes)


def evaluated(material: Material) -> list[int]:
    return [one.id for n in range(1, material.eval_shards + 1) for one in material.eval_shard(n).samples]


def test_held_out_samples_of_a_file_of_their_own(
    variables: dict[str, object], tokenizer: Tokenizer, held_out: Path
) -> None:
    """All lines of the data set are trained on, as without an evaluation, and the format of each file is its own."""
    material = prepare(variables, tokenizer, eval_percent=0, eval_path=held_out)
    status = material.status()
    assert (status.samples, status.eval_samples, status.eval_shards) == (40, 9, 3)
    assert evaluated(material) == list(range(1, 10))
    text = tokenizer.decode(material.eval_shard(1).samples[0].tokens)
    assert text == "held out 0"
    alone = prepare(variables, tokenizer, eval_percent=0)
    assert material.shard(5) == alone.shard(5)
    assert alone.status().eval_samples == 0


def test_a_cap_takes_the_same_samples_each_time(
    variables: dict[str, object], tokenizer: Tokenizer, held_out: Path
) -> None:
    """What it leaves out stays held out: the cap changes no training shard."""
    whole = prepare(variables, tokenizer)
    some = prepare(variables, tokenizer, eval_max_samples=2)
    assert set(evaluated(some)) < set(evaluated(whole))
    assert (len(evaluated(whole)), len(evaluated(some)), some.eval_shards) == (4, 2, 1)
    assert some.shard(1) == whole.shard(1)
    assert evaluated(prepare(variables, tokenizer, eval_max_samples=2)) == evaluated(some)
    assert evaluated(prepare(variables, tokenizer, eval_max_samples=99)) == evaluated(whole)
    own = {"eval_percent": 0, "eval_path": held_out}
    assert len(evaluated(prepare(variables, tokenizer, eval_max_samples=5, **own))) == 5


def test_a_bad_line_of_the_held_out_file_is_named_with_it(
    variables: dict[str, object], tokenizer: Tokenizer, held_out: Path
) -> None:
    held_out.write_text(held_out.read_text() + "{}\n")
    with pytest.raises(DatasetError, match=r"held-out.jsonl, line 10: "):
        prepare(variables, tokenizer, eval_percent=0, eval_path=held_out)
    skipping = prepare(variables, tokenizer, eval_percent=0, eval_path=held_out, on_invalid="Skip")
    assert (skipping.status().skipped_lines, skipping.status().eval_samples) == (1, 9)
    held_out.unlink()
    with pytest.raises(DatasetError, match=r"held-out.jsonl: no such file"):
        prepare(variables, tokenizer, eval_percent=0, eval_path=held_out)
