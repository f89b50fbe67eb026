"""The driver on a real engine, without Redis: what it computes, how it stops, and when it gives up."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from driver_rig import TOTAL, MakeRig, Rig, running, shard, spec
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, get_scheduler

from coserve_agent.engine.pass_bounds import PassBounds
from coserve_agent.errors import JobFailedError
from coserve_agent.jobs.driver import STEPS_IN_FLIGHT, StopRequested
from coserve_agent.jobs.inflight import OpenSteps
from coserve_agent.jobs.trainlog import DriverState, StepRecord
from coserve_api.job import Schedule
from coserve_api.job_status import FailedReason
from coserve_contract.shards import Sample, Shard
from coserve_engine.messages import ForwardBackward, OptimStep, PassMode, SetPriority, SetSlowdown, StartJob


def mean_loss(model: LlamaForCausalLM, samples: list[Sample]) -> float:
    """What transformers says."""
    total = count = 0.0
    for one in samples:
        with torch.no_grad():
            logits = model(torch.tensor([one.tokens])).logits[0, :-1]
        nll = torch.nn.functional.cross_entropy(logits, torch.tensor(one.tokens[1:]), reduction="none")
        weights = torch.tensor(one.weights[1:])
        total += float((nll * weights).sum())
        count += float(weights.sum())
    return total / count


async def test_a_whole_job_and_what_it_computes(model_folder: Path, rig: MakeRig, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    async with running(model_folder) as client, rig(client) as job:
        await job.driver.train()
        sha256 = await job.driver.export(tmp_path / "adapter")
    assert [record.step for record in job.steps] == list(range(1, TOTAL + 1))
    assert [record.samples for record in job.steps] == [tuple(4 * n + k for k in range(4)) for n in range(1, TOTAL + 1)]
    assert [record.lr for record in job.steps] == [1e-2 * (TOTAL - n) / TOTAL for n in range(TOTAL)]
    # B is zero at first, so the first step's loss and the first evaluation are the base model's.
    assert job.steps[0].loss == pytest.approx(mean_loss(model, list(shard(1).samples)), rel=1e-5)
    state = job.driver.state
    assert state.eval_loss_initial == pytest.approx(mean_loss(model, await job.source.eval_samples()), rel=1e-5)
    assert state.eval_loss is not None
    assert [saved.step for saved in job.accepted] == [3, 6, 8]
    assert len(sha256) == 64
    log = [json.loads(line) for line in (tmp_path / "adapter/training_log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == list(range(1, TOTAL + 1))
    assert set(log[0]) == {"step", "loss", "lr", "grad_norm", "tokens", "samples"}
    numbers = [command.seq_no for command in job.commands if isinstance(command, ForwardBackward | OptimStep)]
    assert numbers == sorted(set(numbers))


async def test_a_stopped_and_resumed_job_ends_the_same(model_folder: Path, rig: MakeRig, tmp_path: Path) -> None:
    async with running(model_folder) as client:
        async with rig(client) as whole:
            await whole.driver.train()
            await whole.driver.export(tmp_path / "whole")
        async with rig(client, last=5) as first:
            training = asyncio.create_task(first.driver.train())
            await asyncio.wait_for(first.fifth_step.wait(), 60)
            first.driver.request_stop()
            with pytest.raises(StopRequested):
                await training
            await first.driver.stop()
            assert [saved.step for saved in first.accepted] == [3, 5]
        async with rig(client, resume=first.path(5)) as second:
            assert second.driver.state.step == 5
            await second.driver.train()
            await second.driver.export(tmp_path / "parts")
    assert [record.step for record in (*first.steps, *second.steps)] == list(range(1, TOTAL + 1))
    assert second.driver.state == whole.driver.state
    for name in ("adapter_model.safetensors", "training_log.jsonl"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


async def test_what_may_change_of_a_spec_counts_from_the_next_step_on(model_folder: Path, rig: MakeRig) -> None:
    async with running(model_folder) as client, rig(client, checkpoint_every_steps=100) as job:
        on_step, spec = job.driver._on_step, job.driver._plan.spec

        def change(record: StepRecord, state: DriverState) -> None:
            on_step(record, state)
            if record.step == 2:
                changes = {"checkpoint_every_steps": 2, "priority": 1, "max_slowdown_percent": 20}
                job.driver.update(spec.model_copy(update=changes))

        job.driver._on_step = change
        await job.driver.train()
    assert [saved.step for saved in job.accepted] == [4, 6, 8]
    assert [one.priority for one in job.commands if isinstance(one, SetPriority)] == [2.0]
    assert [one.percent for one in job.commands if isinstance(one, SetSlowdown)] == [20]


@pytest.mark.parametrize("percent", [None, 30])
async def test_the_engine_hears_of_the_slowdown_before_the_job_begins(
    model_folder: Path, rig: MakeRig, percent: int | None
) -> None:
    async with running(model_folder) as client, rig(client, max_slowdown_percent=percent) as job:
        assert [type(one) for one in job.at_start] == [SetSlowdown, StartJob]
        assert job.at_start[0] == SetSlowdown(percent)


async def test_two_steps_are_in_flight_and_no_more(model_folder: Path, rig: MakeRig) -> None:
    async with running(model_folder) as client, rig(client, checkpoint_every_steps=100) as job:
        most = 0

        def look(command: object) -> None:
            nonlocal most
            if isinstance(command, OptimStep):
                submitted = sum(isinstance(one, OptimStep) for one in job.commands)
                most = max(most, submitted - len(job.steps))

        append = job.commands.append
        job.commands = type("Spy", (list,), {"append": lambda self, one: (list.append(self, one), look(one))})()
        await job.driver.train()
        assert append is not None
        assert most == STEPS_IN_FLIGHT


async def test_a_job_that_diverges_fails_after_five_steps(model_folder: Path, rig: MakeRig, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model_folder, broken)
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] * 1e38
    save_file(weights, broken / "model.safetensors")
    async with running(broken) as client, rig(client) as job:
        with pytest.raises(JobFailedError, match="not finite in 5 steps in a row, up to step 5") as caught:
            await job.driver.train()
    assert caught.value.reason is FailedReason.TRAINING_DIVERGED
    assert all(record.skipped and record.loss is None for record in job.steps)
    assert job.driver.state.eval_loss_initial is None


async def test_an_artifact_store_that_cannot_be_written_fails_the_job(
    model_folder: Path, rig: MakeRig, tmp_path: Path
) -> None:
    async with running(model_folder) as client, rig(client) as job:
        job.folder.write_text("a file where a folder should be")
        with pytest.raises(JobFailedError, match="artifact store") as caught:
            await job.driver.train()
        assert caught.value.reason is FailedReason.ARTIFACT_STORE_ERROR
        assert client.alive


async def test_a_checkpoint_of_another_dtype_is_the_endpoints_to_refuse(model_folder: Path, rig: MakeRig) -> None:
    """Not the artifact store's fault: nothing would be gained by another try."""
    async with running(model_folder) as client, rig(client) as job:
        await job.driver.train()
    async with running(model_folder, dtype="bfloat16") as client:
        with pytest.raises(JobFailedError, match=r"state\.json: dtype is float32, .* set engine\.dtype") as caught:
            async with rig(client, resume=job.path(3)):
                pass
    assert caught.value.reason is FailedReason.ENDPOINT_REJECTED


async def test_a_checkpoint_is_due_after_much_data(
    model_folder: Path, rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no checkpoint covers stays in Redis, however rarely the job asks for one."""
    monkeypatch.setattr("coserve_agent.jobs.driver.UNSAVED_BYTES", 1)
    async with running(model_folder) as client, rig(client, checkpoint_every_steps=1000) as job:
        await job.driver.train()
    assert [one.step for one in job.accepted] == list(range(1, TOTAL + 1))


async def test_an_evaluation_without_samples_is_none(model_folder: Path, rig: MakeRig) -> None:
    async with running(model_folder) as client, rig(client) as job:

        async def nothing() -> list[Sample]:
            return []

        job.source.eval_samples = nothing  # type: ignore[method-assign]
        await job.driver.train()
        assert (job.driver.state.eval_loss_initial, job.driver.state.eval_loss) == (None, None)
        assert math.isfinite(job.driver.state.loss or math.nan)


async def test_losses_follow_peft_under_the_trainers_optimizer(
    model_folder: Path, rig: MakeRig, tmp_path: Path
) -> None:
    """AdamW, clipping and schedule as the Trainer has them, from the same random A."""
    options: dict[str, Any] = {
        "schedule": Schedule.COSINE,
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
    }
    async with running(model_folder) as client:
        async with rig(client, **options) as untrained:
            await untrained.driver.export(tmp_path / "start")
        async with rig(client, **options) as job:
            await job.driver.train()
    base = LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model = PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=TOTAL)
    for record in job.steps:
        loss = step_loss(model, shard(record.step).samples)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, 0.5)
        assert record.lr == scheduler.get_last_lr()[0]
        assert record.loss == pytest.approx(loss.item(), rel=1e-4)
        assert record.grad_norm == pytest.approx(norm.item(), rel=1e-3)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def step_loss(model: Any, samples: tuple[Sample, ...]) -> torch.Tensor:
    """The mean over all supervised tokens of the step."""
    total, count = torch.zeros(()), 0.0
    for one in samples:
        logits = model(torch.tensor([one.tokens])).logits[0, :-1]
        nll = torch.nn.functional.cross_entropy(logits, torch.tensor(one.tokens[1:]), reduction="none")
        total = total + (nll * torch.tensor(one.weights[1:])).sum()
        count += sum(one.weights[1:])
    return total / count


async def test_evaluations_come_as_often_as_asked(model_folder: Path, rig: MakeRig) -> None:
    """They change nothing, and one that a checkpoint covers is not done again."""
    async with running(model_folder) as client:
        async with rig(client) as plain:
            await plain.driver.train()
        async with rig(client, eval_every_steps=3) as job:
            await job.driver.train()
        async with rig(client, resume=job.path(8), eval_every_steps=3) as done:
            await done.driver.train()
        async with rig(client, resume=job.path(6), eval_every_steps=3) as resumed:
            await resumed.driver.train()
    assert evaluated(plain) == [0, TOTAL]
    assert evaluated(job) == [0, 3, 6, TOTAL]
    assert evaluated(done) == []
    assert evaluated(resumed) == [6, TOTAL]
    assert job.driver.state == plain.driver.state == done.driver.state == resumed.driver.state
    assert [record.loss for record in job.steps] == [record.loss for record in plain.steps]


def test_an_evaluation_improves_only_where_it_fell() -> None:
    assert DriverState(eval_loss_initial=2.0, eval_loss=1.9).improved
    assert not DriverState(eval_loss_initial=2.0, eval_loss=2.0).improved
    assert not DriverState(eval_loss_initial=2.0).improved
    assert not DriverState(eval_loss=2.0).improved


def evaluated(job: Rig) -> list[int]:
    """After which steps the driver evaluated."""
    passes = [command.work for command in job.commands if isinstance(command, ForwardBackward)]
    return sorted({work.step for work in passes if work.mode is PassMode.EVAL})


async def test_the_engine_is_told_all_that_the_job_says(model_folder: Path, rig: MakeRig) -> None:
    changes: dict[str, Any] = {
        "dropout": 0.1,
        "use_rslora": True,
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-6,
        "priority": -2,
    }
    async with running(model_folder) as client, rig(client, **changes) as job:
        await job.driver.train()
    started: StartJob = job.started[0]
    assert (started.lora.dropout, started.lora.use_rslora, started.priority) == (0.1, True, 0.25)
    step = next(command for command in job.commands if isinstance(command, OptimStep))
    assert (step.beta1, step.beta2, step.eps) == (0.8, 0.95, 1e-6)


def test_a_steps_sequences_carry_its_epoch() -> None:
    steps = OpenSteps("job", spec(), TOTAL, PassBounds(1 << 20, 64, 512), itertools.count(1))
    commands = steps.begin(3, Shard(3, 2, "0" * 64, shard(3).samples), itertools.count(1))
    passes = [command.work for command in commands if isinstance(command, ForwardBackward)]
    assert [seq.epoch for work in passes for seq in work.seqs] == [2] * 4


PAGE_BYTES = 16384


async def test_the_engine_says_how_many_tokens_a_pass_has(model_folder: Path, rig: MakeRig) -> None:
    """Whatever it says, a step sums the same losses."""
    losses = []
    for tokens in (64, 1024):
        async with running(model_folder, pass_tokens=tokens) as client, rig(client) as job:
            assert client.pass_bounds.tokens == tokens
            await job.driver.train()
        losses.append([record.loss for record in job.steps])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == TOTAL


@pytest.mark.parametrize("pages", [4, 5, 8])
async def test_passes_fit_the_pool_whatever_its_size(model_folder: Path, rig: MakeRig, pages: int) -> None:
    """Short samples have a page each, so that few tokens may need many pages. The smallest pool with which the engine
    starts holds one sample of the longest.
    """
    samples = [sample for n in range(1, TOTAL + 1) for sample in shard(n).samples]
    model = LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    async with running(model_folder, (1 + pages) * PAGE_BYTES) as client, rig(client) as job:
        assert client.pass_bounds == PassBounds(pages, 64, 512)

        async def all_samples() -> list[Sample]:
            return samples

        job.source.eval_samples = all_samples  # type: ignore[method-assign]
        await job.driver.train()
    assert [record.step for record in job.steps] == list(range(1, TOTAL + 1))
    assert job.driver.state.eval_loss_initial == pytest.approx(mean_loss(model, samples), rel=1e-5)
    parts = [len(c.work.seqs) for c in job.commands if isinstance(c, ForwardBackward) and c.work.mode is PassMode.EVAL]
    assert max(parts) == pages
