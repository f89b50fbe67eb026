"""Finetuning alone against PEFT: same model, same samples, same micro-batches, one core, one run.

Peers are PEFT in a plain loop, the same with gradient checkpointing, and Hugging Face's Trainer; ours runs with all
that backward can use kept, and with less. Prints tokens a second, bytes that a token keeps between forward and
backward (the head's logits apart, which we never hold), and ratios beside the floors they are held to. Rounds are
interleaved, the best of each counts.
"""

from __future__ import annotations

import argparse
import logging
import random
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import optimizer_step
from peft import LoraConfig, PeftModel, get_peft_model
from random_model import VOCAB, write_random_model
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from coserve_engine.config import LINEARS, EngineConfig
from coserve_engine.engine import Engine
from coserve_engine.host import set_environment
from coserve_engine.messages import LoraSpec, StartJob
from coserve_engine.tensors.kept import levels, row_values

RANK, ALPHA = 16, 32
Batch = list[list[int]]


def ours(model: Path, work: list[Batch], pass_bytes: int | None) -> float:
    """Tokens a second of the engine."""
    engine = Engine(EngineConfig(str(model), pass_bytes=pass_bytes))
    engine.ready()
    engine.submit(StartJob("bench", LoraSpec(RANK, ALPHA, LINEARS), 0))
    while not engine.jobs:
        engine.step()
        time.sleep(0.001)  # as the host does: a loop that never waits holds up the thread that makes the adapter
    for step, batch in enumerate(work):
        for command in optimizer_step("bench", step, [batch]):
            engine.submit(command)
    started = time.perf_counter()
    while not engine.idle:
        engine.step()
    return rate(work, started)


def rate(work: list[Batch], started: float) -> float:
    return sum(len(tokens) for batch in work for tokens in batch) / (time.perf_counter() - started)


def wrapped(model: Path, *, checkpointing: bool = False) -> PeftModel:
    base = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    found: PeftModel = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(LINEARS)))
    found.train()
    return found


def padded(batch: Batch) -> dict[str, torch.Tensor]:
    longest = max(map(len, batch))
    ids = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens in batch])
    mask = torch.tensor([[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens in batch])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def peft(model: Path, work: list[Batch], *, checkpointing: bool = False) -> float:
    """Tokens a second of PEFT: padded batches, AdamW, clipping."""
    adapted = wrapped(model, checkpointing=checkpointing)
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    started = time.perf_counter()
    for batch in work:
        adapted(**padded(batch)).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return rate(work, started)


def trainer(model: Path, work: list[Batch]) -> float:
    """Tokens a second of the Trainer over the same batches, in order."""
    adapted = wrapped(model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=1, max_steps=len(work), learning_rate=1e-3, logging_steps=10**6,
            save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, dataloader_num_workers=0,
        )  # fmt: skip
        data: Any = [padded(batch) for batch in work]
        started = time.perf_counter()
        Trainer(adapted, arguments, train_dataset=data, data_collator=lambda items: items[0]).train()
        return rate(work, started)


def kept_by_autograd(model: Path, batch: Batch, *, checkpointing: bool = False) -> float:
    """Bytes a token that autograd saves for backward, weights and what outlives the head apart."""
    adapted = wrapped(model, checkpointing=checkpointing)
    frozen = {p.untyped_storage().data_ptr() for p in adapted.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen and VOCAB not in tensor.shape:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs = padded(batch)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        adapted(**inputs)
    return sum(saved.values()) / inputs["input_ids"].numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", type=Path, help="a folder; without it a random model of 32 M parameters is made")
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--samples", type=int, default=1, help="samples of a batch")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    set_environment()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or write_random_model(Path(folder))
        config = LlamaForCausalLM.from_pretrained(model).config
        draw, vocab = random.Random(0), config.vocab_size
        work = [
            [[draw.randrange(vocab) for _ in range(options.length)] for _ in range(options.samples)]
            for _ in range(options.batches)
        ]
        shapes = levels(Engine(EngineConfig(str(model))).executor.model)
        values = [4 * config.num_hidden_layers * row_values(level) for level in shapes]
        rows = options.length * options.samples
        methods: dict[str, tuple[Callable[[], float], float]] = {
            "PEFT, plain loop": (lambda: peft(model, work), kept_by_autograd(model, work[0])),
            "PEFT, gradient checkpointing": (
                lambda: peft(model, work, checkpointing=True),
                kept_by_autograd(model, work[0], checkpointing=True),
            ),
            "PEFT, Trainer": (lambda: trainer(model, work), kept_by_autograd(model, work[0])),
            "ours, everything kept": (lambda: ours(model, work, None), values[0]),
            "ours, without gate and up": (lambda: ours(model, work, values[1] * rows), values[1]),
            "ours, inputs and attention": (lambda: ours(model, work, 0), values[2]),
        }
        best = dict.fromkeys(methods, 0.0)
        for _ in range(options.rounds):
            for name, (method, _) in methods.items():
                best[name] = max(best[name], method())
    base, base_bytes = best["PEFT, plain loop"], methods["PEFT, plain loop"][1]
    print(f"{'':30s}{'tokens/s':>10s}{'x PEFT':>8s}{'bytes a token':>15s}{'of PEFT':>9s}")
    for name, (_, kept) in methods.items():
        print(f"{name:30s}{best[name]:10.0f}{best[name] / base:8.2f}{kept:15.0f}{kept / base_bytes:8.0%}")
    for name, peer, floor in (
        ("ours, everything kept", "PEFT, plain loop", 1.0),
        ("ours, everything kept", "PEFT, Trainer", 1.0),
        ("ours, inputs and attention", "PEFT, plain loop", 0.8),
        ("ours, inputs and attention", "PEFT, gradient checkpointing", 1.15),
    ):
        print(f"{name} / {peer}: {best[name] / best[peer]:.2f} x, floor {floor:.2f} x")


if __name__ == "__main__":
    main()
