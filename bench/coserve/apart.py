"""A real peer: transformers' continuous batching and PEFT's Trainer in processes of their own, on one core.

    python -m coserve.apart --rate 0.6 --requests 16

The same random model and the same requests as in `python -m coserve`, whose report names the rate; the operating
system shares the core between both, by the Trainer's nice value. Prints what users see and what the Trainer gets,
beside serving alone (the Trainer stopped) and the Trainer alone.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from itertools import pairwise
from multiprocessing import get_context
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import torch
from random_model import VOCAB, write_random_model
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaForCausalLM

from coserve.__main__ import TRACE
from coserve_engine.config import LINEARS
from coserve_engine.host import set_environment
from coserve_engine.simulate.result import RequestTimes, Result
from coserve_engine.simulate.trace import Arrival, at_rate, read_trace

SAMPLE_TOKENS, SAMPLES_PER_STEP = 512, 4
PAGE = 32
NICE = (0, 10, 19)
SETTLE_S = 5.0


def train(folder: str, core: int, tokens: Synchronized[int]) -> None:
    """The Trainer with PEFT, for ever; `tokens` counts what is trained."""
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415
    from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: PLC0415

    _settle(core)

    class Counting(TrainerCallback):
        def on_substep_end(self, *_: Any, **__: Any) -> None:
            tokens.value += SAMPLE_TOKENS

        on_step_end = on_substep_end

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=list(LINEARS)))
    draw = random.Random(0)
    rows = [torch.tensor([[draw.randrange(VOCAB) for _ in range(SAMPLE_TOKENS)]]) for _ in range(SAMPLES_PER_STEP)]
    data: Any = [{"input_ids": ids, "labels": ids} for ids in rows]
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            out, per_device_train_batch_size=1, gradient_accumulation_steps=SAMPLES_PER_STEP, max_steps=10**6,
            learning_rate=1e-3, logging_steps=10**6, save_strategy="no", report_to=[], disable_tqdm=True,
            use_cpu=True, dataloader_num_workers=0,
        )  # fmt: skip
        Trainer(
            model, arguments, train_dataset=data, data_collator=lambda items: items[0], callbacks=[Counting()]
        ).train()


def _settle(core: int) -> None:
    set_environment()
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def serve(manager: Any, arrivals: list[Arrival], ttft_s: float, tpot_s: float) -> Result:
    """Submit the requests in their time, and gather when each token was made."""
    draw, result, started = random.Random(1), Result(ttft_s, tpot_s), time.perf_counter()
    came: dict[str, float] = {}
    for number, arrival in enumerate(arrivals):
        time.sleep(max(0.0, started + arrival.at_s - time.perf_counter()))
        prompt = [draw.randrange(VOCAB) for _ in range(arrival.prompt)]
        name = f"{started}-{number}"
        came[name] = started + arrival.at_s
        manager.add_request(prompt, name, max_new_tokens=arrival.output, record_timestamps=True, eos_token_id=-1)
    while len(result.requests) < len(arrivals):
        output = manager.get_result(timeout=600)
        if output is None or output.error:
            raise RuntimeError(f"continuous batching failed: {output and output.error}")
        if output.is_finished():
            times = output.timestamps
            gaps = [after - before for before, after in pairwise(times)]
            at_s = came[output.request_id]
            result.requests.append(RequestTimes(at_s, times[0] - at_s, gaps))
    result.seconds = time.perf_counter() - started
    return result


def main() -> int:
    """Run, and print a line for each sharing."""
    parser = argparse.ArgumentParser(prog="python -m coserve.apart", description=__doc__)
    parser.add_argument("--rate", type=float, required=True, help="requests a second")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--slo-ms", type=float, default=200.0)
    parser.add_argument("--ttft-ms", type=float, default=1000.0)
    parser.add_argument("--alone-s", type=float, default=10.0, help="seconds of the Trainer alone")
    options = parser.parse_args()
    arrivals = at_rate(read_trace(TRACE, options.requests, 8, 4), options.rate)
    core = min(os.sched_getaffinity(0))
    context = get_context("spawn")
    tokens = context.Value("q", 0)
    with tempfile.TemporaryDirectory() as folder:
        _settle(core)
        write_random_model(Path(folder))
        trainer = context.Process(target=train, args=(folder, core, tokens), daemon=True)
        trainer.start()
        try:
            _compare(options, folder, arrivals, trainer.pid or 0, tokens)
        finally:
            trainer.kill()
    return 0


def _compare(
    options: argparse.Namespace, folder: str, arrivals: list[Arrival], trainer: int, tokens: Synchronized[int]
) -> None:
    while not tokens.value:
        time.sleep(0.5)
    before, started = tokens.value, time.perf_counter()
    time.sleep(options.alone_s)
    alone = (tokens.value - before) / (time.perf_counter() - started)
    os.kill(trainer, signal.SIGSTOP)
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    pages = sum(-(-(a.prompt + a.output) // PAGE) + 1 for a in arrivals)
    batching = ContinuousBatchingConfig(
        page_size=PAGE, num_blocks=pages, max_batch_tokens=512, allow_block_sharing=False
    )
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=64)
    with (
        torch.inference_mode(),
        model.continuous_batching_context_manager(
            generation, continuous_batching_config=batching, warmup=False
        ) as manager,
    ):
        serve(manager, [Arrival(0.0, 8, 4)], 60, 60)
        print(f"{len(arrivals)} requests, {options.rate:.2f} a second; the Trainer alone {alone:.0f} tokens/s")
        print(f"{'':24s}{'strict %':>10s}{'TTFT P99 ms':>13s}{'gap P50':>9s}{'gap P99 ms':>12s}{'tokens/s':>10s}")
        for nice in (None, *NICE):
            if nice is not None:
                os.setpriority(os.PRIO_PROCESS, trainer, nice)
                os.kill(trainer, signal.SIGCONT)
                time.sleep(SETTLE_S)
            before = tokens.value
            result = serve(manager, arrivals, options.ttft_ms / 1e3, options.slo_ms / 1e3)
            rate = (tokens.value - before) / result.seconds
            print(
                f"{'serving alone' if nice is None else f'Trainer at nice {nice}':24s}{result.strict_percent:>10.1f}"
                f"{result.ttft_ms(99):>13.0f}{result.gap_ms(50):>9.0f}{result.gap_ms(99):>12.0f}{rate:>10.0f}",
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(main())
