"""Decode and prefill with 1, 4, 16 and 64 adapters in a batch, beside none: same weights, same prompts, one run.

Ranks go round 4, 8, 16, 32, 64, on all seven linears; requests take the adapters in turn. Prints the speed in percent
of no adapter's and, beside it, the most that it could be: what is left when the adapters' products run at the
processor's GEMM speed, or their bytes come at the memory's copying speed, whichever takes longer. Rounds are
interleaved and the median is taken. Aims: decode 90 %, prefill 85 %, where that much could be.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from measure import answer_s, machine_speed
from random_model import VOCAB, write_random_model

from coserve_engine.config import LINEARS, EngineConfig
from coserve_engine.engine import Engine
from coserve_engine.formats.artifacts import peft_files, write_folder
from coserve_engine.host import set_environment
from coserve_engine.messages import AdapterVersion, AddRequest, LoadAdapter, LoraSpec, SamplingParams

RANKS = (4, 8, 16, 32, 64)
PREFILL_REQUESTS, PREFILL_TOKENS = 4, 256


def load_adapters(engine: Engine, folder: Path, count: int) -> list[AdapterVersion]:
    """`count` adapters with random weights."""
    versions = []
    for n in range(count):
        layout = engine.executor.layout(LoraSpec(RANKS[n % len(RANKS)], 16.0, LINEARS))
        flat = layout.fresh(n, torch.float32, torch.device("cpu"))
        texts, tensors = peft_files(layout, flat, "random")
        write_folder(folder / str(n), texts, tensors)
        versions.append(AdapterVersion(f"adapter-{n}", 1))
        engine.submit(LoadAdapter(versions[-1], str(folder / str(n))))
    while not engine.idle:
        engine.step()
        time.sleep(0.001)
    return versions


def requests(count: int, prompt: int, tokens: int, versions: list[AdapterVersion]) -> list[AddRequest]:
    """Requests no two of which begin alike, nor like those of any other call."""
    now, draw = time.monotonic(), random.Random(time.monotonic_ns())
    params = SamplingParams(tokens, ignore_eos=True)
    return [
        AddRequest(
            f"{now}-{i}",
            tuple(draw.randrange(VOCAB) for _ in range(prompt)),
            params,
            now,
            versions[i % len(versions)] if versions else None,
        )
        for i in range(count)
    ]


def decode_s(engine: Engine, count: int, tokens: int, versions: list[AdapterVersion]) -> float:
    """Seconds of one decode iteration of `count` requests."""
    many, few = (answer_s(engine, requests(count, 64, n, versions)) for n in (tokens, 2))
    return (many - few) / (tokens - 2)


def prefill_s(engine: Engine, versions: list[AdapterVersion]) -> float:
    """Seconds of PREFILL_REQUESTS prompts."""
    return answer_s(engine, requests(PREFILL_REQUESTS, PREFILL_TOKENS, 1, versions))


def floor_s(engine: Engine, rows: list[int], bandwidth: float, flops: float) -> float:
    """Seconds that the adapters' products take at least, for so many rows of each adapter."""
    values = [engine.executor.layout(LoraSpec(RANKS[n % len(RANKS)], 16.0, LINEARS)).size for n in range(len(rows))]
    operations = 2 * sum(value * count for value, count in zip(values, rows, strict=True))
    return max(operations / flops, 4 * sum(values) / bandwidth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--requests", type=int, default=64, help="decoded at once")
    parser.add_argument("--tokens", type=int, default=12, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    set_environment()
    with tempfile.TemporaryDirectory() as folder:
        path = write_random_model(Path(folder) / "model")
        config = EngineConfig(
            str(path), kv_cache_bytes=512 << 20, max_requests=64, finetuning=False, ttft_s=60, tpot_s=60
        )
        engine = Engine(config)
        engine.ready()
        versions = load_adapters(engine, Path(folder), max(arguments.adapters))
        print("adapters   decode ms  % of none  possible %   prefill ms  % of none  possible %")
        cases = [0, *arguments.adapters]
        decode: dict[int, list[float]] = {count: [] for count in cases}
        prefill: dict[int, list[float]] = {count: [] for count in cases}
        for _ in range(arguments.rounds):
            for count in cases:
                decode[count].append(decode_s(engine, arguments.requests, arguments.tokens, versions[:count]))
                prefill[count].append(prefill_s(engine, versions[:count]))
        speed = machine_speed()
        for count in cases:
            cells = [f"{count:8d}"]
            per = min(count, PREFILL_REQUESTS)
            for times, rows in (
                (decode, [arguments.requests // count] * count if count else []),
                (prefill, [PREFILL_REQUESTS // per * PREFILL_TOKENS] * per if count else []),
            ):
                none, some = statistics.median(times[0]), statistics.median(times[count])
                possible = none / (none + floor_s(engine, rows, *speed))
                cells.append(f"{1e3 * some:12.1f}{100 * none / some:11.0f}{100 * possible:12.0f}")
            print(" ".join(cells), flush=True)


if __name__ == "__main__":
    main()
