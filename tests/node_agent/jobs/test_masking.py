"""Prompts are not learned: a line's gradient is that of transformers' loss with the prompt masked, in each format."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from data_rows import samples_of
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.engine.pass_bounds import PassBounds
from coserve_agent.jobs.inflight import OpenSteps
from coserve_api.job import DatasetFormat, PublishPolicy, Schedule, TargetModule
from coserve_contract.messages import BindingSpec
from coserve_contract.shards import Sample, Shard
from coserve_engine.config import EngineConfig
from coserve_engine.engine import Engine
from coserve_engine.messages import ForwardBackward, LoraSpec, StartJob

TARGETS = tuple(str(target) for target in TargetModule)
ROWS: dict[DatasetFormat, dict[str, Any]] = {
    DatasetFormat.MESSAGES: {
        "messages": [
            {"role": "user", "content": "one two three"},
            {"role": "assistant", "content": "four five"},
            {"role": "user", "content": "the lazy dog"},
            {"role": "assistant", "content": "jumps"},
        ]
    },
    DatasetFormat.PROMPT_COMPLETION: {"prompt": "the quick brown fox", "completion": " jumps over the lazy dog"},
    DatasetFormat.TEXT: {"text": "one two three four five six seven"},
}
LEARNED = {
    DatasetFormat.MESSAGES: "four five<|end|>jumps<|end|>",
    DatasetFormat.PROMPT_COMPLETION: " jumps over the lazy dog<|end|>",
}


def engine_gradient(model: Path, samples: tuple[Sample, ...]) -> torch.Tensor:
    """Gradient of the first step of a job whose driver got these samples."""
    spec = BindingSpec(
        job_uid="j", job_name="job", namespace="default", adapter_name="a", adapter_number=1, rank=8, alpha=16,
        target_modules=tuple(TargetModule), learning_rate=1e-3, schedule=Schedule.LINEAR, warmup_steps=0, batch_size=4,
        weight_decay=0.0, max_grad_norm=0.0, seed=1, checkpoint_every_steps=9, checkpoint_keep=2,
        publish=PublishPolicy.NEVER,
    )  # fmt: skip
    steps = OpenSteps("job", spec, 1, PassBounds(1 << 20, 64, 512), itertools.count(1))
    engine = Engine(EngineConfig(str(model), max_model_length=256, kv_cache_bytes=4 << 20))
    engine.submit(StartJob("job", LoraSpec(8, 16.0, TARGETS), 1))
    for command in steps.begin(1, Shard(1, 0, "0" * 64, samples), itertools.count(1)):
        if isinstance(command, ForwardBackward):
            engine.submit(command)
    while not engine.idle:
        engine.step()
    job = engine.jobs["job"]
    return torch.cat([b.flatten() for layer in job.layout.views(job._grad) for _, b in layer.values()])


def transformers_gradient(model: Path, samples: tuple[Sample, ...], *, masked: bool) -> torch.Tensor:
    """Of B at B = 0, where A is PEFT's own and its size does not show: so A is set to the engine's."""
    engine = Engine(EngineConfig(str(model), max_model_length=256, kv_cache_bytes=4 << 20))
    engine.submit(StartJob("job", LoraSpec(8, 16.0, TARGETS), 1))
    while not engine.idle:
        engine.step()
    base = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        tuned = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=list(TARGETS)))
    parameters = dict(tuned.named_parameters())
    order = []
    for index, layer in enumerate(engine.jobs["job"].weights.layers):
        for name, (a, *_) in layer.items():
            stem = next(key for key in parameters if f"layers.{index}." in key and f"{name}.lora_A" in key)
            parameters[stem].data.copy_(a)
            order.append(parameters[stem.replace("lora_A", "lora_B")])
    total, count = torch.zeros(()), 0
    for sample in samples:
        chosen = [bool(weight) or not masked for weight in sample.weights]
        labels = [token if keep else -100 for token, keep in zip(sample.tokens, chosen, strict=True)]
        supervised = sum(label != -100 for label in labels[1:])
        loss = tuned(input_ids=torch.tensor([sample.tokens]), labels=torch.tensor([labels])).loss
        total, count = total + loss * supervised, count + supervised
    (total / count).backward()
    return torch.cat([parameter.grad.flatten() for parameter in order])


@pytest.mark.parametrize("format", list(ROWS))
def test_the_gradient_is_that_of_the_masked_loss(
    model_folder: Path, tokenizer: Tokenizer, format: DatasetFormat
) -> None:
    (sample,) = samples_of(tokenizer, ROWS[format], format=format)
    if format in LEARNED:
        learned = [token for token, weight in zip(sample.tokens, sample.weights, strict=True) if weight]
        assert tokenizer.decode(learned, False) == LEARNED[format]
    found = engine_gradient(model_folder, (sample,))
    expected = transformers_gradient(model_folder, (sample,), masked=True)
    assert (found - expected).norm() / expected.norm() < 1e-4
    unmasked = transformers_gradient(model_folder, (sample,), masked=False)
    assert ((unmasked - expected).norm() / expected.norm() > 1e-2) == (format in LEARNED), "negative control"


def test_a_step_is_the_mean_over_its_supervised_tokens(model_folder: Path, tokenizer: Tokenizer) -> None:
    """Not over its samples or passes: lines of unlike lengths, together and apart."""
    long = {"prompt": "one", "completion": " two three four five six seven" * 18}
    short = {"prompt": "the quick brown fox jumps" * 12, "completion": " six"}
    rows = [samples_of(tokenizer, row, max_length=250)[0] for row in (long, short, long, short, long)]
    samples = tuple(replace(sample, id=n) for n, sample in enumerate(rows, 1))
    assert sum(len(sample.tokens) for sample in samples) > 512, "more than one pass"
    found = engine_gradient(model_folder, samples)
    expected = transformers_gradient(model_folder, samples, masked=True)
    assert (found - expected).norm() / expected.norm() < 1e-4
    mean_of_means = sum(transformers_gradient(model_folder, (sample,), masked=True) for sample in samples) / 5
    assert (mean_of_means - expected).norm() / expected.norm() > 1e-2, "negative control"
