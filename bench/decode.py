"""Decode against transformers' continuous batching and its static generate: same weights, same prompts, one run.

A method's time for one decode iteration is the difference of two runs, of many tokens and of few, so that prefill and
set-up drop out. Rounds are interleaved and the median is taken. The floor is one read of the weights and of the keys
and values at the memory's copying speed, or the products at the processor's GEMM speed, whichever is longer.
"""

from __future__ import annotations

import argparse
import logging
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measure import answer_s, machine_speed
from random_model import VOCAB, write_random_model
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaForCausalLM

from coserve_engine.config import EngineConfig
from coserve_engine.engine import Engine
from coserve_engine.host import set_environment
from coserve_engine.messages import AddRequest, SamplingParams

FEW = 2
Prompts = list[list[int]]
Method = Callable[[Prompts, int], float]
"""(prompts, tokens to generate) -> seconds."""


def ours(engine: Engine, prompts: Prompts, tokens: int) -> float:
    """Run all prompts through the engine's own loop, each with another first token: a prompt that the prefix cache
    knows from the round before would spoil the difference.
    """
    work = []
    for i, prompt in enumerate(prompts):
        params, first, now = (
            SamplingParams(tokens, ignore_eos=True),
            time.monotonic_ns() // 1000 % VOCAB,
            time.monotonic(),
        )
        work.append(AddRequest(f"{now}-{i}", (first, *prompt[1:]), params, now))
    return answer_s(engine, work)


def generate(model: LlamaForCausalLM, prompts: Prompts, tokens: int) -> float:
    """One static batch of equally long prompts."""
    ids = torch.tensor(prompts)
    started = time.perf_counter()
    with torch.inference_mode():
        length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **length)
    return time.perf_counter() - started


def continuous(model: LlamaForCausalLM, prompts: Prompts, tokens: int) -> float:
    """transformers' continuous batching with a cache of its own, sized for the work."""
    generation = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    length = len(prompts[0]) + tokens
    pages = len(prompts) * (length // 32 + 2)
    batching = ContinuousBatchingConfig(
        page_size=32, num_blocks=pages, max_batch_tokens=max(512, len(prompts)), allow_block_sharing=False
    )
    started = time.perf_counter()
    out = model.generate_batch(prompts, generation_config=generation, continuous_batching_config=batching, warmup=False)
    taken = time.perf_counter() - started
    short = [len(o.generated_tokens) for o in out.values() if len(o.generated_tokens) != tokens]
    if short or len(out) != len(prompts):
        raise RuntimeError(f"continuous batching generated {short or len(out)} where {tokens} were asked for")
    return taken


def floor_s(model: LlamaForCausalLM, requests: int, context: int) -> float:
    """Seconds of one iteration that memory and arithmetic allow on one core."""
    bandwidth, flops = machine_speed()
    config = model.config
    weights = sum(p.numel() for p in model.parameters()) - config.vocab_size * config.hidden_size
    kv = requests * context * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return max(4 * (weights + kv) / bandwidth, 2 * requests * weights / flops)


def iteration_s(method: Method, prompts: Prompts, many: int) -> float:
    """Seconds of one decode iteration."""
    return (method(prompts, many) - method(prompts, FEW)) / (many - FEW)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--prompt", type=int, default=224, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=34, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    set_environment()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        path = write_random_model(Path(folder))
        engine = Engine(EngineConfig(str(path), kv_cache_bytes=512 << 20, finetuning=False, ttft_s=60, tpot_s=60))
        engine.ready()
        model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
        methods: dict[str, Method] = {
            "ours": lambda prompts, tokens: ours(engine, prompts, tokens),
            "static generate": lambda prompts, tokens: generate(model, prompts, tokens),
            "continuous batching": lambda prompts, tokens: continuous(model, prompts, tokens),
        }
        draw = random.Random(0)
        print("requests   floor    ours  static  contin.  ours/floor  static/ours  contin./ours  (ms an iteration)")
        for count in arguments.requests:
            prompts = [[draw.randrange(VOCAB) for _ in range(arguments.prompt)] for _ in range(count)]
            times: dict[str, list[float]] = {name: [] for name in methods}
            for _ in range(arguments.rounds):
                for name, method in methods.items():
                    times[name].append(iteration_s(method, prompts, arguments.tokens))
            a, b, c = (1e3 * statistics.median(times[name]) for name in methods)
            floor = 1e3 * floor_s(model, count, arguments.prompt + arguments.tokens // 2)
            print(
                f"{count:8d}{floor:8.1f}{a:8.1f}{b:8.1f}{c:9.1f}{a / floor:12.2f}{b / a:13.2f}{c / a:14.2f}", flush=True
            )


if __name__ == "__main__":
    main()
