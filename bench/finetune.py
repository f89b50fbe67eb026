"""Finetuning alone against PEFT in a plain loop: same model, same samples, same micro-batches, one core, one run.

Prints tokens a second of both and their ratio; the floor that the ratio is held to is 1.0.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from coserve_engine.config import LINEARS, EngineConfig
from coserve_engine.engine import Engine
from coserve_engine.messages import ForwardBackward, LoraSpec, OptimStep, Pass, StartJob, TrainSeq

MODEL = Path(__file__).parents[1] / "examples" / "base-model"
Batch = list[list[int]]


def batches(count: int, size: int, vocab: int) -> list[Batch]:
    """`count` batches of `size` samples of 100 to 200 tokens."""
    draw = random.Random(0)
    return [
        [[draw.randrange(vocab) for _ in range(draw.randrange(100, 200))] for _ in range(size)] for _ in range(count)
    ]


def ours(work: list[Batch]) -> float:
    """Tokens a second of the engine."""
    engine = Engine(EngineConfig(str(MODEL)))
    engine.ready()
    engine.submit(StartJob("bench", LoraSpec(8, 16.0, LINEARS), 0))
    seq_no = 0
    for step, batch in enumerate(work):
        weight = 1.0 / sum(len(tokens) - 1 for tokens in batch)
        seqs = tuple(TrainSeq(i, tuple(tokens), (weight,) * len(tokens)) for i, tokens in enumerate(batch))
        engine.submit(ForwardBackward("bench", seq_no + 1, Pass(step, "bench", step, 0, seqs)))
        engine.submit(OptimStep("bench", seq_no + 2, 1e-3))
        seq_no += 2
    started = time.perf_counter()
    while not engine.idle:
        engine.step()
    return sum(len(tokens) for batch in work for tokens in batch) / (time.perf_counter() - started)


def peft(work: list[Batch]) -> float:
    """Tokens a second of PEFT: padded batches, AdamW, clipping."""
    base = LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=list(LINEARS)))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    started = time.perf_counter()
    for batch in work:
        longest = max(map(len, batch))
        ids = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens in batch])
        mask = torch.tensor([[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens in batch])
        model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return sum(len(tokens) for batch in work for tokens in batch) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3, help="both run this often, in turn; the best of each counts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    work = batches(options.batches, 4, 4096)
    rates = [(ours(work), peft(work)) for _ in range(options.rounds)]
    best, reference = (max(column) for column in zip(*rates, strict=True))
    print(f"finetuning alone: {best:.0f} tokens/s, PEFT {reference:.0f}: {best / reference:.2f} x, floor 1.00 x")


if __name__ == "__main__":
    main()
