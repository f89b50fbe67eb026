"""What a CUDA device computes and how fast, in steps that a limit may cut and another run goes on
with: exactness against float64 first, then waits and memory, then finetuning, decode, and both at once.

Prints nothing that is not in FOLDER too: results.json, and summary.md to read. Ends with 0 when all steps are done and
met, 1 when one failed or was not met, 2 where it cannot run, 3 where the limit left steps for another run.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import busy
import exactness
import machine
import torch
from models import LLAMA_31_8B, MEDIUM, write_model
from random_models import MODELS, PLAIN
from runner import Figures, OtherRunError, Results, Step, run_steps
from speed import LOADS, ROWS, Sizes, Speed

from coserve_engine.host import set_environment

ROOT = Path(__file__).parents[2]
DONE, NOT_MET, REFUSED, LEFT = range(4)
SMALL = tuple(name for name in MODELS if name != "smol")
LARGE = Sizes(LLAMA_31_8B, 5.0, 4096, 1024, 128, 8192, 8192, 256, 24 << 30)
TINY = Sizes({**LLAMA_31_8B, **PLAIN}, 1.0, 96, 20, 5, 256, 256, 64, 4 << 20)


def steps(device: torch.device, found: Callable[[str], Figures], folder: Path, *, rehearse: bool) -> Iterator[Step]:
    """In the order in which they are worth having. A rehearsal has the same, of tiny sizes."""

    def scaled(seconds: float) -> float:
        return seconds / 100 if rehearse else seconds

    def model(name: str) -> Path:
        path = folder / name
        return path if path.exists() else write_model(path, MEDIUM if name == "medium" else MODELS[name])

    for name in SMALL[:1] if rehearse else SMALL:
        yield Step(f"parity {name}", scaled(5), lambda _, name=name: exactness.parity(model(name), device))
    if not rehearse:
        yield Step("parity medium", 20, lambda _: exactness.parity(model("medium"), device))
    yield Step("parity of a job", scaled(10), lambda _: exactness.jobs(model("plain"), device))
    yield Step("waits", scaled(20), lambda _: busy.waits(model("plain"), folder / "adapters", device))

    def rates(_: float) -> Figures:
        found = machine.rates(device, *((64, 1 << 12, 0.01) if rehearse else (8192, 1 << 30, 5.0)))
        line = f"- {found.flops_per_s / 1e12:.3g} TFLOP/s in bfloat16, {found.bytes_per_s / 1e12:.3g} TB/s copied"
        return {"flops_per_s": found.flops_per_s, "bytes_per_s": found.bytes_per_s, "lines": [line]}

    yield Step("rates", scaled(15), rates)
    speed = Speed(TINY if rehearse else LARGE, device, found)
    yield Step("sizing", scaled(20), speed.size)
    yield Step("finetuning alone", scaled(45), speed.finetune)
    yield Step("finetuning, word by word", scaled(30), speed.budget)
    for rows in ROWS:
        yield Step(f"decode {rows}", scaled(25), partial(speed.decode, rows))
    for load in LOADS:
        yield Step(f"both at {load} % load", scaled(45), partial(speed.both, load))


def source() -> str:
    """Which code is measured."""
    digest = hashlib.sha256()
    globs = ("engine/**/*.py", "bench/gpu/*.py", "bench/measure.py", "tests/engine/shared/*.py")
    for path in sorted(path for pattern in globs for path in ROOT.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def refusal(*, rehearse: bool) -> str | None:
    """Why this machine can time nothing."""
    if rehearse:
        return None
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device here; --rehearse runs the same steps, tiny, on the CPU"
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        return f"{torch.cuda.get_device_name()} computes no bfloat16, which all steps need; take Ampere or later"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/gpu/run", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of results; a run goes on from what is there")
    parser.add_argument(
        "--limit", type=float, default=540.0, help="seconds after which it ends, from when torch is loaded"
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU: figures mean nothing")
    options = parser.parse_args()
    end = time.monotonic() + options.limit
    why = refusal(rehearse=options.rehearse)
    if why is not None:
        print(f"bench/gpu/run: {why}", file=sys.stderr)
        return REFUSED
    set_environment(dtype="float64")
    device = torch.device("cpu" if options.rehearse else "cuda")
    try:
        of = {"machine": machine.name(device), "triton": machine.triton(device), "source": source()}
        results = Results(options.out, of)
    except OtherRunError as error:
        print(f"bench/gpu/run: {error}", file=sys.stderr)
        return REFUSED
    print(", ".join(f"{name}: {value}" for name, value in of.items()))
    with tempfile.TemporaryDirectory() as folder:
        plan = list(steps(device, results.found, Path(folder), rehearse=options.rehearse))
        left = run_steps(plan, results, time.monotonic, end)
    if left is not None:
        print(f"--limit of {options.limit:g} s: {left!r} and what follows is left for another run with the same --out")
        return LEFT
    return DONE if all(results.held(step.name) for step in plan) else NOT_MET


if __name__ == "__main__":
    sys.exit(main())
