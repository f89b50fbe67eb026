"""Split and order are functions of the seed alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coserve_agent.data.order import StepOrder, capped, split

IDS = st.lists(st.integers(1, 10_000), min_size=1, max_size=60, unique=True).map(sorted)


@given(IDS, st.integers(0, 50), st.integers(0, 2**31 - 1))
def test_a_split_shares_nothing_and_keeps_something_to_train_on(ids: list[int], percent: int, seed: int) -> None:
    parts = split(ids, percent, seed)
    assert sorted((*parts.train, *parts.eval)) == ids
    assert parts.train
    assert bool(parts.eval) == (percent > 0 and len(ids) > 1)
    assert parts == split(ids, percent, seed)


@given(IDS, st.integers(1, 70), st.integers(0, 99))
def test_a_cap_grows_without_a_change_of_what_it_has(ids: list[int], most: int, seed: int) -> None:
    some, more = capped(ids, most, seed), capped(ids, most + 1, seed)
    assert len(some) == min(most, len(ids))
    assert list(some) == sorted(some)
    assert set(some) <= set(more) <= set(ids)
    assert capped(ids, None, seed) == tuple(ids)


@given(IDS, st.integers(1, 9), st.integers(0, 99), st.integers(1, 4))
def test_every_epoch_has_every_sample_once(ids: list[int], batch: int, seed: int, epochs: int) -> None:
    order = StepOrder(tuple(ids), batch, seed, epochs, None)
    steps = [order.batch(step) for step in range(1, order.total_steps + 1)]
    assert all(1 <= len(step) <= batch for step in steps)
    per_epoch = order.steps_per_epoch
    for epoch in range(epochs):
        seen = [one for step in steps[epoch * per_epoch : (epoch + 1) * per_epoch] for one in step]
        assert sorted(seen) == ids
    assert [order.epoch_of(step) for step in (1, order.total_steps)] == [0, epochs - 1]


def test_the_order_is_fixed_for_ever() -> None:
    """A job resumed by a newer version must go on with the same samples."""
    assert split(range(1, 21), 10, 7).eval == GOLDEN_EVAL
    order = StepOrder(tuple(range(1, 9)), 3, 7, None, 100)
    assert [order.batch(step) for step in (1, 2, 3, 4)] == GOLDEN_STEPS
    assert order.total_steps == 100
    assert StepOrder(tuple(range(1, 9)), 3, 8, None, 100).batch(1) != GOLDEN_STEPS[0]


GOLDEN_EVAL = (1, 9)
GOLDEN_STEPS = [(5, 1, 6), (8, 2, 3), (7, 4), (3, 4, 7)]
