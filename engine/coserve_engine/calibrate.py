"""A short run of made-up work at start-up, so that the first plans rest on measurements of this machine and model."""

from __future__ import annotations

import random
from collections.abc import Callable

from coserve_engine.batch import SequenceRows
from coserve_engine.config import LINEARS
from coserve_engine.cost import CostModel
from coserve_engine.executor import Executor
from coserve_engine.lora import LoraWeights
from coserve_engine.messages import LoraSpec, Pass, TrainSeq
from coserve_engine.passes import pages_of_pass
from coserve_engine.plan import Kind, Segment, Unit
from coserve_engine.work import NO_WORK, decode_work, prefill_work

ROUNDS = 2
PASS_ID = -1


def calibrate(executor: Executor, cost: CostModel, clock: Callable[[], float]) -> tuple[str, ...]:
    """Measure decode, prefill and finetuning of several sizes and teach `cost`. Returns lines for the log."""
    started = clock()
    longest = min(executor.config.max_model_length, 384)
    pages = executor.ledger.reserve("calibration", executor.numerics.pages(longest))
    shapes = [(Kind.DECODE, n, at) for n in (1, 4, 12) for at in (longest // 8, longest - 1)]
    shapes += [(Kind.PREFILL, n, 0) for n in (min(16, longest), longest // 2, longest)]
    warm_up = CostModel()
    for model in (warm_up, *([cost] * ROUNDS)):
        for kind, count, start in shapes:
            _forward(executor, model, clock, kind, count, start, pages)
    executor.ledger.free("calibration")
    if executor.config.finetuning:
        for model in (warm_up, cost, cost):
            for length in (min(64, longest), longest):
                _pass(executor, model, clock, length)
        executor.buffers.clear()
    cost.forget_errors()
    decode = decode_work([256] * 8, executor.numerics.tile, executor.reaches)
    return (
        f"calibrated in {clock() - started:.1f} s: 8 decode rows at context 256: {cost.forward_s(decode) * 1e3:.1f} ms",
    )


def _forward(
    executor: Executor,
    cost: CostModel,
    clock: Callable[[], float],
    kind: Kind,
    count: int,
    start: int,
    pages: tuple[int, ...],
) -> None:
    tokens = [1] * (start + count)
    slots = range(count) if kind is Kind.DECODE else range(1)
    length = 1 if kind is Kind.DECODE else count
    segments = tuple(Segment(kind, slot, start, length, sample=True) for slot in slots)
    rows = {slot: SequenceRows(tokens, pages) for slot in slots}
    begin = clock()
    executor.forward(segments, rows)
    seconds, how = clock() - begin, (executor.numerics.tile, executor.reaches)
    work = decode_work([start] * count, *how) if kind is Kind.DECODE else prefill_work(start, length, *how)
    cost.observe(work, seconds, ())


def _pass(executor: Executor, cost: CostModel, clock: Callable[[], float], length: int) -> None:
    spec = LoraSpec(min(8, executor.config.max_rank), 16.0, LINEARS)
    layout = executor.layout(spec)
    weights = LoraWeights.trained(layout, layout.fresh(0, executor.dtype, executor.device))
    draw = random.Random(length)
    tokens = tuple(draw.randrange(executor.model.vocab_size) for _ in range(length))
    work = Pass(PASS_ID, "calibration", 0, 0, (TrainSeq(0, tokens, (1.0,) * length),))
    pages = executor.ledger.reserve(f"pass:{PASS_ID}", pages_of_pass((length,), executor.numerics))
    state = executor.open_pass(work, weights, layout, pages)
    shape = state.shape
    for index in range(len(shape.tiles)):
        begin = clock()
        executor.forward((shape.window(index, index + 1),), {})
        cost.observe(shape.forward(index, index + 1), clock() - begin, ())
    while not state.done:
        layer, end = state.layer, state.end_tile
        first = max(0, end - 1 - layer % 3)
        begin = clock()
        executor.backward(Unit(PASS_ID, layer, first, end))
        cost.observe(NO_WORK, 0.0, [(shape.backward(layer, first, end), clock() - begin)])
    executor.close_pass(PASS_ID)
