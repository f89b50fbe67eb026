"""A whole job on SmolLM2-135M-Instruct learns what the Trainer with PEFT learns from the same samples.

The rows go the way of every job: a file, the feeder's process, shards in Redis, an agent's process, a published
adapter. What the Trainer gets is made here with transformers alone, from the lines that the feeder's order names.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from gsm8k import load_split
from peft import PeftModel
from peft_reference import Reference
from random_models import Adapter
from trainer_reference import UNLEARNED, Row, mean_loss, relative, trained
from transformers import AutoModelForCausalLM, AutoTokenizer

from coserve_agent.chat.end_tokens import end_tokens
from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.data.material import Material
from coserve_agent.data.rendering import Renderer
from coserve_agent.settings import FeederSettings
from coserve_api.job import OnInvalid, Schedule
from coserve_contract.messages import Completed
from coserve_contract.shards import Sample
from coserve_engine.config import LINEARS
from coserve_engine.formats.model_folder import read_model_config
from coserve_engine.messages import LoraSpec
from coserve_engine.tensors.lora import LoraLayout

pytestmark = pytest.mark.nightly

SCRIPT = Path(__file__).parents[3] / "examples" / "smollm2.py"
STEPS, BATCH, LENGTH = 60, 4, 112
RATE, WARM_UP, DECAY, CLIP = 1e-3, 6, 0.01, 1.0
RANK, ALPHA = 8, 16
SYSTEM = {"role": "system", "content": "Answer in JSON."}
PER_STEP, HELD_OUT = 1e-3, 5e-3
LONG_S = 3600


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    subprocess.run([sys.executable, str(SCRIPT), "--out", str(folder)], check=True)
    return folder


@dataclass(frozen=True)
class Data:
    """The samples of each step in their order and those held out, as transformers' own template writes them. The last
    step of an epoch has fewer.
    """

    material: Material
    train: list[list[Row]]
    held_out: list[Row]


def labelled(tokenizer: Any, messages: list[dict[str, str]]) -> Row:
    """The answer and the end of its turn are learned, directly behind the prompt."""
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    learned = [*tokenizer(messages[-1]["content"]).input_ids, tokenizer.eos_token_id]
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    assert whole[: len(prompt) + len(learned)] == prompt + learned, "the template writes something else"
    return Row(tuple(prompt + learned), (UNLEARNED,) * len(prompt) + tuple(learned))


def read(settings: FeederSettings, lines: list[dict[str, Any]]) -> Data:
    folder = settings.model_path
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    material = Material.prepare(settings, Renderer(ours, end_tokens(folder, ours)), ours.size)

    def row(sample: Sample) -> Row:
        made = labelled(theirs, lines[sample.id - 1]["messages"])
        assert sample.tokens == made.tokens
        assert sample.weights == tuple(float(label != UNLEARNED) for label in made.labels)
        return made

    shards = [material.shard(step) for step in range(1, STEPS + 1)]
    held_out = [material.eval_shard(number) for number in range(1, material.eval_shards + 1)]
    return Data(
        material,
        [[row(sample) for sample in shard.samples] for shard in shards],
        [row(sample) for shard in held_out for sample in shard.samples],
    )


@dataclass(frozen=True)
class Curve:
    """Losses of all steps, and the mean loss over what is held out before and after them."""

    losses: list[float]
    before: float
    after: float
    seconds: float


def reference(folder: Path, seed: int) -> PeftModel:
    """PEFT's model, its A those with which a job of this seed begins, its B zero."""
    layout = LoraLayout(read_model_config(folder), LoraSpec(RANK, float(ALPHA), LINEARS))
    fresh = layout.fresh(seed, torch.float32, torch.device("cpu"))
    return Reference.of(folder, torch.float32, Adapter(layout, fresh)).model


def by_trainer(folder: Path, data: Data, seed: int, out: Path) -> Curve:
    torch.set_num_threads(1)  # of this thread; the agent computes beside it
    begun = time.monotonic()
    model = reference(folder, seed)
    before = mean_loss(model, data.held_out)
    losses = train(model, data.train, out).losses
    return Curve(losses, before, mean_loss(model.eval(), data.held_out), time.monotonic() - begun)


def train(model: PeftModel, steps: list[list[Row]], out: Path) -> Any:
    return trained(
        model, steps, out, max_steps=len(steps), learning_rate=RATE, lr_scheduler_type="cosine", warmup_steps=WARM_UP,
        weight_decay=DECAY, max_grad_norm=CLIP,
    )  # fmt: skip


def published(folder: Path, adapter: Path, rows: list[Row]) -> float:
    """The mean loss with the adapter as PEFT reads it."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return mean_loss(PeftModel.from_pretrained(base, adapter), rows)


def with_prompt(row: Row) -> Row:
    return Row(row.tokens, row.tokens)


def without_end(row: Row) -> Row:
    return Row(row.tokens, (*row.labels[:-1], UNLEARNED))


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_a_job_learns_what_the_trainer_learns(
    cluster: Any, redis_server: Any, smollm2: Path, tmp_path: Path, seed: int
) -> None:
    lines = [{"messages": [SYSTEM, *problem.messages()["messages"]]} for problem in load_split().job]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    variables: dict[str, Any] = {
        "redis_url": redis_server.url, "redis_password": redis_server.password, "endpoint_uid": cluster.endpoint_uid,
        "job_uid": cluster.a, "job_name": "job", "dataset_path": path, "dataset_root": tmp_path, "model_path": smollm2,
        "eval_percent": 10, "max_sequence_length": LENGTH, "on_invalid": OnInvalid.SKIP, "batch_size": BATCH,
        "max_steps": STEPS, "seed": seed,
    }  # fmt: skip
    data = read(FeederSettings(**variables), lines)
    agent = await cluster.agent(model_path=smollm2, max_model_length=LENGTH, kv_cache_bytes=256 << 20)
    feeder = cluster.programs.start("feeder", **variables)
    begun = time.monotonic()
    await cluster.bind(
        cluster.a, agent, rank=RANK, alpha=ALPHA, target_modules=LINEARS, learning_rate=RATE, warmup_steps=WARM_UP,
        batch_size=BATCH, weight_decay=DECAY, max_grad_norm=CLIP, seed=seed, schedule=Schedule.COSINE,
        checkpoint_every_steps=25,
    )  # fmt: skip
    trainer = asyncio.to_thread(by_trainer, smollm2, data, seed, tmp_path / "trainer")
    expected, result = await asyncio.gather(trainer, cluster.result(cluster.a, LONG_S))
    assert isinstance(result, Completed), (result, agent.log, feeder.log)
    assert result.adapter is not None
    folder = cluster.artifacts / result.adapter.path
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    shards = [data.material.shard(step) for step in range(1, STEPS + 1)]
    assert {len(shard.samples) for shard in shards} > {BATCH}, "no epoch ended"
    assert [row["samples"] for row in log] == [[sample.id for sample in shard.samples] for shard in shards]
    assert [row["tokens"] for row in log] == [shard.tokens for shard in shards]
    losses = [row["loss"] for row in log]
    served = published(smollm2, folder, data.held_out)
    print(
        f"\nseed {seed}: worst step {relative(losses, expected.losses):.1e} ({losses[0]:.3f} to {losses[-1]:.3f}); "
        f"held out {len(data.held_out)}: {result.eval_loss_initial:.6f} to {result.eval_loss:.6f}, Trainer "
        f"{expected.before:.6f} to {expected.after:.6f}, published {served:.6f}; {time.monotonic() - begun:.0f} s, of "
        f"these the Trainer {expected.seconds:.0f} s"
    )
    assert relative(losses, expected.losses) < PER_STEP
    assert relative([result.eval_loss_initial, result.eval_loss], [expected.before, expected.after]) < HELD_OUT
    assert relative([served], [result.eval_loss]) < 1e-4
    assert expected.after < 0.7 * expected.before, "nothing was learned"
    # Negative control: with other labels the curve is another, from the first steps on. Learning rates are the same
    # there, since all of them warm up.
    for wrong in (with_prompt, without_end):
        steps = [[wrong(row) for row in step] for step in data.train[:WARM_UP]]
        control = train(reference(smollm2, seed), steps, tmp_path / "wrong").losses
        assert relative(losses[:WARM_UP], control) > 10 * PER_STEP
