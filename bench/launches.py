"""What the host takes to launch kernels, beside the driver: python bench/launches.py

Words of the table `triton` at Llama-3.1-8B's sizes, 64 rows of decode at 1,024 tokens of context, on tensors of a CPU;
the last step of a launch, which hands over to the driver (2 us, as others report), is left out. A figure is the best of
some runs: what a neighbour takes is no part of it. Held to 4 us a launch, 6 with the driver's. A word without its
tensors is its launches and what it asks of its arguments to find their constants.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import Any
from unittest import mock

import torch

from coserve_engine.kernels.triton import attention, encode, gate, launch, lora, norm
from coserve_engine.kernels.triton.attention_parts import Heads
from coserve_engine.kernels.triton.lora_tables import FEW, LoraTables

ROWS, HIDDEN, HEADS, KV_HEADS, SIZE, INTERMEDIATE, PAGES = 64, 4096, 32, 8, 128, 14336, 16
LAYERS, ADAPTERS, RANK, QKV = 32, 8, 16, ("q_proj", "k_proj", "v_proj")
RUNS, CALLS = 40, 200
FLOOR_US = 4.0


def best_us(word: Callable[[], object]) -> float:
    """Microseconds of a call."""
    word()
    taken = []
    for _ in range(RUNS):
        started = time.perf_counter()
        for _ in range(CALLS):
            word()
        taken.append((time.perf_counter() - started) / CALLS)
    return 1e6 * min(taken)


def words() -> dict[str, Callable[[], object]]:
    """By name, the call."""
    x, weight = torch.zeros(ROWS, HIDDEN, dtype=torch.bfloat16), torch.zeros(HIDDEN, dtype=torch.bfloat16)
    qkv = torch.zeros(ROWS, (HEADS + 2 * KV_HEADS) * SIZE, dtype=torch.bfloat16)
    y = torch.zeros_like(qkv)
    q, k, v = (part.view(ROWS, -1, SIZE) for part in qkv.split([HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE], 1))
    k_pool, v_pool = (torch.zeros(KV_HEADS, 64 * (ROWS + 1), SIZE, dtype=torch.bfloat16) for _ in range(2))
    rope, at = torch.zeros(2, 2048, SIZE), torch.zeros(ROWS, dtype=torch.int64)
    encoded, o = (torch.zeros(ROWS, HEADS, SIZE, dtype=torch.bfloat16) for _ in range(2))
    table = torch.zeros(ROWS, PAGES, dtype=torch.int64)
    of = Heads(HEADS, KV_HEADS, SIZE, 64, 64, None, True)
    a, b = torch.zeros(ROWS, 2 * INTERMEDIATE, dtype=torch.bfloat16).split(INTERMEDIATE, 1)
    rows, blocks = torch.zeros(ADAPTERS, 4, dtype=torch.int64), ROWS // ADAPTERS
    tables = LoraTables(
        *(torch.zeros(LAYERS * 7, ADAPTERS, 4, dtype=torch.int64), rows, torch.zeros(LAYERS * 7, dtype=torch.int32)),
        *(torch.zeros(blocks, 4, dtype=torch.int64), torch.zeros(ROWS, dtype=torch.int64)),
        *(blocks, ROWS, RANK, frozenset(QKV), FEW, False),
    )
    low, outs = lora.shrink(x, tables, 3, QKV), (HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE)
    return {
        "norm of a sum": lambda: norm.forward(x, weight, 1e-5, x),
        "heads, rotation, cache": lambda: encode.forward(q, k, v, None, None, 1e-5, rope, at, at, k_pool, v_pool),
        "attention in splits": lambda: attention.decode(encoded, k_pool, v_pool, at, table, o, of),
        "gate": lambda: gate.forward(a, b),
        "adapters, shrink": lambda: lora.shrink(x, tables, 3, QKV),
        "adapters, expand": lambda: lora.expand(low, y, tables, 3, QKV, outs),
    }


@contextmanager
def reused(word: Callable[[], object]) -> Iterator[None]:
    """Where it makes tensors, it gets those that it made once."""
    made: list[torch.Tensor] = []

    def kept(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *arguments, **options: made.append(make(*arguments, **options)) or made[-1]

    with mock.patch.multiple(torch, empty=kept(torch.empty), empty_like=kept(torch.empty_like)):
        word()
    again = cycle(made)
    with mock.patch.multiple(torch, empty=lambda *_, **__: next(again), empty_like=lambda *_, **__: next(again)):
        yield


def launched_us(word: Callable[[], object]) -> list[float]:
    """Microseconds of each launch of a call, without what the word does beside."""
    asked: list[tuple[Any, ...]] = []
    with mock.patch.object(launch, "run", lambda *arguments: asked.append(arguments)):
        word()

    def again(kernel: Any, grid: Any, arguments: Any, constants: Any) -> float:
        return best_us(lambda: kernel.launch(grid, constants, *arguments))

    return [again(*one) for one in asked]


def main() -> None:
    def nothing(*arguments: object) -> None:
        """In the driver's place."""

    with mock.patch.object(launch, "prepared", lambda *arguments: nothing):
        worst = 0.0
        for name, word in words().items():
            taken = launched_us(word)
            worst = max(worst, *taken)
            said = ", ".join(f"{us:.1f}" for us in taken)
            with reused(word):
                without = best_us(word)
            print(f"{name:24} launch {said} us; the word {without:.1f}, with its tensors {best_us(word):.1f}")
    print(f"{worst:.1f} us a launch at most, held to {FLOOR_US:.0f}")


if __name__ == "__main__":
    main()
