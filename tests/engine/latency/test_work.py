"""What the latency model counts is what attention reads: with a sliding window only the tiles that it reaches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coserve_engine.latency.work import decode_work, keys_read, mean_reaches, prefill_work
from coserve_engine.messages import AddRequest, IterationDone, SamplingParams
from coserve_engine.numerics import Numerics
from coserve_engine.scheduler.plan import PassShape

TILE = 64
NUMERICS = Numerics(tile=TILE)
windows = st.lists(st.one_of(st.none(), st.integers(1, 700)), min_size=1, max_size=4)


def shape_of(count: int, layers: list[int | None]) -> PassShape:
    tiles = tuple((TILE, (n + 1) * TILE) for n in range(count))
    return PassShape(0, tiles, len(layers), True, NUMERICS.reaches(layers))


def test_a_window_is_counted_by_the_tiles_that_it_reaches() -> None:
    """The first row of a tile sees 130 keys before its own: two whole tiles and a part of a third."""
    reaches = mean_reaches(NUMERICS.reaches([131]))
    assert reaches == ((256, 1.0),)
    assert decode_work([1000], TILE, reaches) == (1, 0, 0, 1, 256, 4 * 256)
    assert prefill_work(960, 70, TILE, reaches) == (0, 70, 0, 2, 512, 64 * 256 + 6 * 256)
    assert decode_work([1000], TILE) == (1, 0, 0, 1, 1024, 4 * 1024)


def test_layers_count_by_their_share_and_units_by_their_own() -> None:
    layers: list[int | None] = [None, 64, 64, None]
    assert decode_work([1000], TILE, mean_reaches(NUMERICS.reaches(layers))).kv_rows == (1024 + 128) / 2
    shape = shape_of(8, layers)
    assert shape.forward(7, 8) == (0, 0, 64, 1, (512 + 128) / 2, 64 * (512 + 128) / 2)
    assert [shape.backward(layer, 7, 8).pairs for layer in range(5)] == [64 * 512, 64 * 128, 64 * 128, 64 * 512, 0]


@given(layers=windows, length=st.integers(1, 500), start=st.integers(0, 500))
def test_a_window_as_long_as_the_sequence_counts_as_none(layers: list[int | None], length: int, start: int) -> None:
    longest = start + length
    long = [None if window is None else longest + window - 1 for window in layers]
    reaches, count = mean_reaches(NUMERICS.reaches(long)), NUMERICS.tiles(longest)
    assert decode_work([start, longest - 1], TILE, reaches) == decode_work([start, longest - 1], TILE)
    assert prefill_work(start, length, TILE, reaches) == prefill_work(start, length, TILE)
    one, other = shape_of(count, long), shape_of(count, [None] * len(long))
    assert one.forward(0, count) == other.forward(0, count)
    assert all(one.backward(n, 0, count) == other.backward(n, 0, count) for n in range(len(long) + 1))


@given(layers=windows, length=st.integers(1, 500), start=st.integers(0, 500))
def test_a_shorter_window_never_counts_for_more(layers: list[int | None], length: int, start: int) -> None:
    shorter = mean_reaches(NUMERICS.reaches([window and max(1, window - 100) for window in layers]))
    reaches = mean_reaches(NUMERICS.reaches(layers))
    less, more = (prefill_work(start, length, TILE, of) for of in (shorter, reaches))
    whole = prefill_work(start, length, TILE)
    assert less.kv_rows <= more.kv_rows * (1 + 1e-9) and more.kv_rows <= whole.kv_rows * (1 + 1e-9)


@pytest.mark.parametrize("model", ("plain", "mistral", "qwen2"))
def test_the_masks_of_a_model_read_what_is_counted(rig: Any, model_path: Callable[[str], str], model: str) -> None:
    executor = rig(model_path(model)).executor
    masks, tile = executor.kernels.masks, executor.numerics.tile
    for end in range(tile, 8 * tile, tile):
        read = sum(end - mask.first_key(end) for mask in masks) / len(masks)
        assert keys_read(end, executor.reaches) == pytest.approx(read)
    assert bool(executor.reaches) == (model != "plain")


def test_the_engine_plans_by_what_is_read(driver: Any, model_path: Callable[[str], str], draw_tokens: Any) -> None:
    """The plan of a request with a long context says its keys as the model's windows do."""
    seen: dict[str, float] = {}
    for model in ("plain", "mistral"):
        d = driver(model_path(model))
        policy = d.engine._policy
        plans: list[Any] = []

        def spied(*view: Any, policy: Any = policy, plans: Any = plans) -> Any:
            plans.append(policy(*view))
            return plans[-1]

        d.engine._policy = spied
        d.submit(AddRequest("r", draw_tokens(0, 200), SamplingParams(3, ignore_eos=True), d.clock.now))
        d.run()
        assert len(d.of(IterationDone)) >= 3
        seen[model] = next(plan.work.kv_rows for plan in reversed(plans) if plan.work.decode)
    assert seen == {"plain": 256, "mistral": 128}
