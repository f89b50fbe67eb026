"""The simulated GPU: bytes for few rows, operations for many, steps between, and launches where a kernel is short."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coserve_engine.latency.work import ForwardWork, UnitWork, decode_work
from coserve_engine.scheduler.plan import PassShape
from coserve_engine.simulate.device import H200
from coserve_engine.simulate.roofline import LLAMA_1B_ON_H200, LLAMA_8B, LLAMA_ON_H200, bucket

WEIGHTS = 32 * 218_103_808 + 128_256 * 4096


def window(rows: int) -> ForwardWork:
    return PassShape(0, tuple((64, 64 * (n + 1)) for n in range(rows // 64)), 32, training=True).forward(0, rows // 64)


def test_one_row_takes_the_bytes_of_the_weights_and_64_hardly_more() -> None:
    floor_s = 2 * WEIGHTS / H200.bytes_per_s
    one, many = (LLAMA_ON_H200.forward_s(decode_work([64] * n, 64)) for n in (1, 64))
    assert 1.1 * floor_s < one < 1.25 * floor_s
    assert many < 1.25 * one


def test_many_rows_take_their_operations() -> None:
    rows = 4096
    seconds = LLAMA_ON_H200.forward_s(window(rows))
    assert 2 * rows * (WEIGHTS - 128_256 * 4096) / seconds > 0.6 * H200.flops_per_s
    assert LLAMA_ON_H200.forward_s(window(2 * rows)) > 1.9 * seconds


def test_finetuning_alone_is_what_arithmetic_says() -> None:
    """72 us a token at 4,096 rows, 83 at 512, of attention over 4,096 each (within a tenth and a fifth)."""
    shape = PassShape(0, tuple((64, 64 * (n + 1)) for n in range(64)), 32, training=True)

    def token_s(tiles: int) -> float:
        starts = range(0, 64, tiles)
        forward_s = sum(LLAMA_ON_H200.forward_s(shape.forward(at, at + tiles)) for at in starts)
        units = [shape.backward(layer, at, at + tiles) for layer in (0, 32) for at in starts]
        inner_s, head_s = (sum(LLAMA_ON_H200.unit_s(u) for u in units if u.head is head) for head in (False, True))
        return (forward_s + 32 * inner_s + head_s) / 4096

    assert token_s(64) == pytest.approx(72e-6, rel=0.1)
    assert token_s(8) == pytest.approx(83e-6, rel=0.2)
    assert token_s(1) > 2 * token_s(8)


def test_rows_cost_by_steps_of_tiles_and_buckets() -> None:
    def layer_s(rows: int) -> float:
        return sum(H200.product_s(rows, out, 4096, 2) for out in (4096, 6144, 28_672))

    assert layer_s(1100) == pytest.approx(layer_s(1150), rel=0.01)
    assert layer_s(1153) > 1.03 * layer_s(1152)
    assert [bucket(n) for n in (1, 3, 5, 8, 9, 250)] == [1, 4, 8, 8, 16, 256]
    assert LLAMA_ON_H200.forward_s(decode_work([64] * 17, 64)._replace(kv_rows=0, pairs=0)) == LLAMA_ON_H200.forward_s(
        decode_work([64] * 24, 64)._replace(kv_rows=0, pairs=0)
    )


def test_a_unit_of_a_tile_is_bound_by_the_host() -> None:
    slow_host = replace(LLAMA_ON_H200, device=replace(H200, launch_s=2 * H200.launch_s))
    tile, many = UnitWork(False, 64, 1, 64 * 64), UnitWork(False, 4096, 64, 4096 * 2048)
    assert slow_host.launch_s(tile) == 2 * LLAMA_ON_H200.launch_s(tile) > slow_host.unit_s(tile)
    assert slow_host.launch_s(many) < slow_host.unit_s(many) == LLAMA_ON_H200.unit_s(many)
    assert slow_host.launch_s(decode_work([64], 64)) < 1e-4, "a graph"


def test_a_part_of_it_is_as_much_slower() -> None:
    for work in (decode_work([500] * 40, 64), window(1024)):
        assert LLAMA_ON_H200.slower(3).forward_s(work) == pytest.approx(3 * LLAMA_ON_H200.forward_s(work))


@pytest.mark.parametrize("rows", (64, 512, 2048, 8192))
def test_rows_beside_others_cost_no_more_than_alone(rows: int) -> None:
    """What the work-conserving bound charges is what nothing undercuts."""
    work, beside = window(rows), decode_work([500] * 64, 64)
    assert LLAMA_ON_H200.rows_s(work) + LLAMA_ON_H200.fixed_s <= LLAMA_ON_H200.forward_s(work)
    both = LLAMA_ON_H200.rows_s(work) + LLAMA_ON_H200.rows_s(beside) + LLAMA_ON_H200.fixed_s
    assert both <= LLAMA_ON_H200.forward_s(work.plus(beside))


def test_a_small_model_has_graphs_of_forwards_that_are_shorter_than_their_launches() -> None:
    small, work = LLAMA_1B_ON_H200, ForwardWork(decode=20, prefill=40, calls=21, kv_rows=2000, pairs=8000)
    launched = replace(small, mixed=False)
    assert small.mixed_rows(work) == 128
    assert small.launch_s(work) == 4 * H200.launch_s
    assert small.forward_s(work) == small.forward_s(work._replace(prefill=108)) >= launched.forward_s(work)
    assert small.forward_s(work) <= launched.launch_s(work) == 16 * 18 * H200.launch_s
    for more in (work._replace(prefill=4000), work._replace(decode=300)):
        assert small.mixed_rows(more) == 0
        assert small.launch_s(more) == launched.launch_s(more)
    assert LLAMA_ON_H200.mixed_rows(work) == 0
    assert small.mixed_rows(ForwardWork()) == small.mixed_rows(decode_work([64] * 9, 64)) == 0


def test_other_models_have_other_times() -> None:
    half = replace(LLAMA_ON_H200, model=replace(LLAMA_8B, layers=16))
    assert half.forward_s(window(2048)) == pytest.approx(LLAMA_ON_H200.forward_s(window(2048)) / 2, rel=1e-6)
