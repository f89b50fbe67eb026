"""A job that goes on from an adapter begins with exactly that: its loss is PEFT's. What it cannot train it refuses."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft_folders import save_adapter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from coserve_engine.config import LINEARS
from coserve_engine.messages import (
    AdapterExported,
    CheckpointDone,
    Continued,
    ExportAdapter,
    ForwardBackward,
    JobFailed,
    JobStarted,
    LoraSpec,
    Pass,
    PassDone,
    PassMode,
    SaveCheckpoint,
    StartJob,
    TrainSeq,
)

FOLDERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "two": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]},
    "patterns_that_say_the_same": {"r": 4, "rank_pattern": {".*": 8}, "alpha_pattern": {"_proj": 24}},
    "half": {"r": 9},
}
SHAPES = {
    "plain": LoraSpec(6, 12.0, LINEARS),
    "rslora": LoraSpec(6, 12.0, LINEARS, use_rslora=True),
    "two": LoraSpec(3, 5.0, ("q_proj", "down_proj")),
    "patterns_that_say_the_same": LoraSpec(8, 12.0, LINEARS),
    "half": LoraSpec(9, 12.0, LINEARS),
}


@pytest.fixture(scope="module")
def folder(plain: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = save_adapter(plain, tmp_path_factory.mktemp(name), **FOLDERS[name])
        return made[name]

    return make


def evaluation(tokens: tuple[int, ...], seq_no: int = 1) -> ForwardBackward:
    seq = TrainSeq(0, tokens, (1.0,) * len(tokens))
    return ForwardBackward("job", seq_no, Pass(1, "job", 0, 0, (seq,), PassMode.EVAL))


def peft_loss(model: str, folder: Path | None, tokens: tuple[int, ...]) -> float:
    """The sum over all tokens but the first."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        loaded: Any = AutoModelForCausalLM.from_pretrained(model)
        loaded = loaded if folder is None else PeftModel.from_pretrained(loaded, folder)
        logits = loaded(torch.tensor([tokens])).logits[0, :-1]
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="sum"))


@pytest.mark.parametrize("name", FOLDERS)
def test_it_begins_with_the_loss_that_peft_has(
    driver: Any, plain: str, draw_tokens: Any, folder: Any, name: str
) -> None:
    d, tokens = driver(), draw_tokens(7, 130)
    d.submit(StartJob("job", Continued(str(folder(name)), dropout=0.5), 0), evaluation(tokens))
    started, done = d.run().one(JobStarted), d.one(PassDone)
    assert (started.step, started.lora, started.lora.dropout) == (0, SHAPES[name], 0.5)
    assert done.loss_sum == pytest.approx(peft_loss(plain, folder(name), tokens), rel=1e-5)
    fresh = driver()
    fresh.submit(StartJob("job", SHAPES[name], 0), evaluation(tokens))
    assert fresh.run().one(PassDone).loss_sum == pytest.approx(peft_loss(plain, None, tokens), rel=1e-5)
    assert abs(done.loss_sum / fresh.one(PassDone).loss_sum - 1) > 1e-3, "the adapter changes the loss"


def test_it_writes_back_what_it_read(driver: Any, plain: str, folder: Any, tmp_path: Path) -> None:
    """Without a step the weights go through unchanged."""
    d = driver()
    d.submit(StartJob("job", Continued(str(folder("plain"))), 0), ExportAdapter("job", 1, str(tmp_path / "a"), plain))
    d.run().one(AdapterExported)
    before, after = (load_file(one / "adapter_model.safetensors") for one in (folder("plain"), tmp_path / "a"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_it_trains_as_peft_does_and_resumes_to_the_bit(driver: Any, training: Any, folder: Any, tmp_path: Path) -> None:
    start = StartJob("job", Continued(str(folder("two")), dropout=0.1), 5)
    commands = training(steps=4)
    per_step = len(commands) // 4
    save = SaveCheckpoint("job", 0, str(tmp_path / "s2"))
    stream = [*commands[: 2 * per_step], save, *commands[2 * per_step :]]
    stream = [replace(command, seq_no=number) for number, command in enumerate(stream, 1)]
    whole = driver()
    whole.submit(start, *stream)
    whole.run().one(CheckpointDone)
    resumed = driver(jitter_s=0.004, seed=3)
    gone = Continued(str(tmp_path / "gone"), dropout=0.1)  # the checkpoint is enough
    resumed.submit(replace(start, lora=gone, resume=str(tmp_path / "s2")), *stream)
    assert resumed.run().one(JobStarted).lora == SHAPES["two"]
    assert torch.equal(resumed.parameters(), whole.parameters())
    other = driver()  # negative control: begun anew, it ends elsewhere
    other.submit(replace(start, lora=replace(SHAPES["two"], dropout=0.1)), *stream)
    assert not torch.equal(other.run().parameters(), whole.parameters())


def test_the_start_is_copied_once_not_shared(driver: Any, training: Any, folder: Any, tmp_path: Path) -> None:
    """Two jobs that go on from one folder train each its own weights."""
    d = driver()
    lora = Continued(str(folder("two")))
    for name in ("job", "other"):
        d.submit(StartJob(name, lora, 0))
    d.run()
    before = d.parameters("other")
    d.submit(*training(steps=1))
    d.run()
    assert torch.equal(d.parameters("other"), before)
    assert not torch.equal(d.parameters("job"), before)


# ---- refusals ----


def refusal(d: Any, lora: Continued) -> str:
    d.submit(StartJob("job", lora, 0))
    failed = d.run().one(JobFailed)
    assert failed.code == "invalid_adapter"
    assert d.engine.jobs == {}
    return str(failed.message)


@pytest.mark.parametrize(
    ("said", "field"),
    [
        ({"rank": 8}, "adapter.rank is 8"),
        ({"alpha": 6.0}, "adapter.alpha is 6.0"),
        ({"targets": ("q_proj",)}, "adapter.targetModules is ['q_proj']"),
        ({"use_rslora": True}, "adapter.useRslora is True"),
    ],
)
def test_another_shape_than_the_job_says_is_refused_by_name(
    driver: Any, folder: Any, said: dict[str, Any], field: str
) -> None:
    message = refusal(driver(), Continued(str(folder("two")), **said))
    assert field in message
    assert "leave it out" in message


def test_the_same_shape_said_again_is_taken(driver: Any, folder: Any) -> None:
    said = Continued(str(folder("two")), 0.0, 3, 5.0, ("down_proj", "q_proj"), False)
    d = driver()
    d.submit(StartJob("job", said, 0))
    assert d.run().one(JobStarted).lora == SHAPES["two"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank_pattern": {"q_proj": 4}}, ("rank_pattern", "k_proj rank 6", "q_proj has 4", "one rank")),
        ({"rank_pattern": {"layers.1.*": 4}}, ("rank_pattern", "layers.1.", "one rank")),
        ({"alpha_pattern": {"v_proj": 3}}, ("alpha_pattern", "v_proj alpha 3", "one alpha")),
        ({"layers_to_transform": [0]}, ("layer 1 adapts []", "layers_to_transform")),
        (
            {"target_modules": r".*layers\.0\.self_attn\.q_proj|.*layers\.1\.mlp\.up_proj"},
            ("['up_proj']", "['q_proj']"),
        ),
        ({"r": 65}, ("r is 65", "maxRank")),
        ({"use_dora": True}, ("use_dora",)),
    ],
)
def test_an_adapter_that_no_job_can_train_is_refused_by_name(
    driver: Any, plain: str, tmp_path: Path, settings: dict[str, Any], words: tuple[str, ...]
) -> None:
    message = refusal(driver(), Continued(str(save_adapter(plain, tmp_path / "a", **settings))))
    assert all(word in message for word in (str(tmp_path / "a"), *words)), message


def test_a_folder_that_is_not_there(driver: Any, tmp_path: Path) -> None:
    assert str(tmp_path / "none") in refusal(driver(), Continued(str(tmp_path / "none")))


def test_a_checkpoint_of_another_shape_is_refused(
    driver: Any, training: Any, start_job: Any, folder: Any, tmp_path: Path
) -> None:
    d = driver()
    d.submit(start_job(), *training(steps=1), SaveCheckpoint("job", 99, str(tmp_path / "s1")))
    d.run()
    other = driver()
    other.submit(StartJob("job", Continued(str(folder("two")), rank=3), 0, str(tmp_path / "s1")))
    failed = other.run().one(JobFailed)
    assert failed.code == "invalid_checkpoint"
    assert "adapter.rank is 3" in failed.message
    assert "state.json" in failed.message
