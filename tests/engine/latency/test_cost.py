"""The latency model learns linear costs from noisy measurements, bounds them, and follows a machine that slows down."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from coserve_engine.latency.cost import LESSON, MISS_RATE, CostModel
from coserve_engine.latency.errorbound import ErrorBound, Highest
from coserve_engine.latency.fit import OnlineFit, Prior
from coserve_engine.latency.regimes import Regime
from coserve_engine.latency.work import ForwardWork, UnitWork


def forward_work(source: random.Random) -> ForwardWork:
    decode, prefill, finetune = source.randint(1, 20), source.choice((0, 0, 64, 200)), source.choice((0, 64, 256))
    calls = decode + (prefill + finetune) // 64
    kv_rows = 256 * calls
    return ForwardWork(decode, prefill, finetune, calls, kv_rows, kv_rows * 16)


def true_forward_s(work: ForwardWork) -> float:
    return (
        4e-3
        + 1e-4 * work.decode
        + 5e-5 * work.prefill
        + 6e-5 * work.finetune
        + 2e-4 * work.calls
        + 1e-6 * work.kv_rows
        + 1e-8 * work.pairs
    )


def unit_work(source: random.Random) -> UnitWork:
    tiles = source.randint(1, 4)
    return UnitWork(source.random() < 0.2, 64 * tiles, tiles, 64 * 256 * tiles)


def true_unit_s(work: UnitWork) -> float:
    return 1e-3 + (4e-5 if work.head else 2e-5) * work.rows + 1e-8 * work.pairs


def noise(source: random.Random) -> float:
    """Mostly a few percent; one in twenty is a hiccup of a half."""
    return source.uniform(0.97, 1.05) * (1.5 if source.random() < 0.05 else 1.0)


def teach(model: CostModel, source: random.Random, count: int, factor: float = 1.0) -> None:
    for _ in range(count):
        work, unit = forward_work(source), unit_work(source)
        model.observe(
            work,
            factor * true_forward_s(work) * noise(source),
            [(unit, factor * true_unit_s(unit) * noise(source))],
        )


@pytest.fixture
def taught() -> CostModel:
    model = CostModel()
    teach(model, random.Random(0), 600)
    return model


def test_predictions_converge(taught: CostModel) -> None:
    source = random.Random(1)
    for _ in range(200):
        work = forward_work(source)
        assert taught.forward_s(work) == pytest.approx(true_forward_s(work), rel=0.1)


def test_a_few_measurements_are_enough_to_begin_with() -> None:
    model, source = CostModel(), random.Random(2)
    teach(model, source, 12)
    errors = sorted(abs(model.forward_s(w) / true_forward_s(w) - 1) for w in (forward_work(source) for _ in range(100)))
    assert errors[50] < 0.15


def test_bounds_cover_what_follows(taught: CostModel) -> None:
    source, above, units_above, count = random.Random(3), 0, 0, 2000
    for _ in range(count):
        work, unit = forward_work(source), unit_work(source)
        above += true_forward_s(work) * noise(source) > taught.forward_bound_s(work)
        units_above += true_unit_s(unit) * noise(source) > taught.unit_bound_s(unit)
    assert above / count < 0.02
    assert units_above / count < 0.02
    assert taught.forward_bound_s(ForwardWork(decode=8, calls=8)) < 2 * taught.forward_s(ForwardWork(decode=8, calls=8))


@pytest.mark.parametrize("factor", (0.5, 2.0))
def test_another_speed_is_learned(taught: CostModel, factor: float) -> None:
    source = random.Random(4)
    works = [forward_work(source) for _ in range(50)]
    teach(taught, source, 30, factor)
    if factor > 1:
        covered = sum(taught.forward_bound_s(w) >= factor * true_forward_s(w) for w in works)
        assert covered >= 48, "bound and speed follow within seconds"
    teach(taught, source, 400, factor)
    for work in works:
        assert taught.forward_s(work) == pytest.approx(factor * true_forward_s(work), rel=0.15)


def test_nothing_costs_nothing(taught: CostModel) -> None:
    assert taught.forward_s(ForwardWork()) == taught.forward_bound_s(ForwardWork()) == 0.0


def test_more_work_is_never_predicted_to_take_less(taught: CostModel) -> None:
    source = random.Random(5)
    for _ in range(200):
        a, b = forward_work(source), forward_work(source)
        assert taught.forward_s(a.plus(b)) >= max(taught.forward_s(a), taught.forward_s(b))


def test_a_prior_decides_what_was_never_measured_and_nothing_else() -> None:
    prior = Prior((5e-3, 1e-3, 2e-3), (1.0, 10.0, 10.0))
    fit, bare = OnlineFit(3, prior=prior), OnlineFit(3)
    assert fit.predict((1.0, 2.0, 3.0)) == pytest.approx(13e-3)
    for n in range(40):
        for made in (fit, bare):
            made.update([((1.0, n % 7, 0.0), 1e-3 + 4e-3 * (n % 7))])
    assert fit.predict((1.0, 5.0, 0.0)) == pytest.approx(21e-3, rel=0.02)
    assert fit.predict((0.0, 0.0, 1.0)) == pytest.approx(2e-3)
    assert bare.predict((0.0, 0.0, 1.0)) == 0.0, "the control"


def test_a_prior_that_is_far_off_gives_way() -> None:
    fit = OnlineFit(2, prior=Prior((1e-6, 1.0), (1.0, 10.0)))
    for n in range(20):
        fit.update([((1.0, n % 5), 3e-3 + 1e-3 * (n % 5))])
    assert fit.predict((1.0, 2.0)) == pytest.approx(5e-3, rel=0.1)


def test_a_prior_parts_what_is_never_apart() -> None:
    """Rows and tiles of units of whole tiles, decode rows and their attention calls."""
    fit = OnlineFit(2, prior=Prior((2e-3, 1e-3), (1.0, 1.0)))
    for _ in range(40):
        fit.update([((1.0, 1.0), 6e-3)])
    assert fit.predict((1.0, 1.0)) == pytest.approx(6e-3, rel=0.01)
    assert min(fit.coefficients) > 1.5e-3


def test_features_that_never_vary_alone_do_no_harm() -> None:
    fit = OnlineFit(3)
    for n in range(200):
        x = float(n % 7)
        fit.update([((1.0, x, 2 * x), 1e-3 + 3e-3 * x)])
    assert fit.predict((1.0, 5.0, 10.0)) == pytest.approx(16e-3, rel=0.05)
    assert all(c >= 0 for c in fit.coefficients)


# ---- the error bound ----


def misses(bound: ErrorBound, source: random.Random, spread: Callable[[int], float], count: int) -> int:
    """How many of `count` ratios, log-normal with the spread at that time, exceed the bound of the moment."""
    found = 0
    for n in range(count):
        ratio = math.exp(source.gauss(0.0, spread(n)))
        found += ratio > bound.ratio
        bound.update((ratio,))
    return found


@pytest.mark.parametrize("spread", (0.02, 0.05, 0.1))
def test_at_most_one_iteration_in_a_thousand_is_over(spread: float) -> None:
    bound = ErrorBound(MISS_RATE)
    assert misses(bound, random.Random(0), lambda n: spread, 20_000) <= 20
    assert bound.ratio < math.exp(4.5 * spread) + 0.05
    assert bound.spread == pytest.approx(spread, rel=0.25)


def test_errors_that_grow_are_followed() -> None:
    """The spread rises slowly for ever: a quantile of the past alone is always behind (the control)."""
    followed, fixed = ErrorBound(MISS_RATE), ErrorBound(MISS_RATE, step=0.0)

    def rising(n: int) -> float:
        return 0.02 + 1e-5 * n

    assert misses(followed, random.Random(1), rising, 20_000) <= 30
    assert misses(fixed, random.Random(1), rising, 20_000) > 60


@pytest.mark.parametrize("slowed", (1, 30))
@pytest.mark.parametrize("early", (True, False))
def test_one_stall_does_not_poison_the_bound(early: bool, slowed: int) -> None:
    source, bound = random.Random(2), ErrorBound(MISS_RATE)
    misses(bound, source, lambda n: 0.03, 40 if early else 2000)
    before = bound.ratio
    bound.update((50.0,) * slowed)
    misses(bound, source, lambda n: 0.03, 50)
    assert bound.ratio < before + 0.2


def test_one_stall_does_not_bend_the_fit(taught: CostModel) -> None:
    work = ForwardWork(8, 0, 64, 9, 9 * 256, 9 * 256 * 16)
    before = taught.forward_s(work)
    taught.observe(work, 100 * before, ())
    for _ in range(LESSON):
        taught.observe(work, before, ())
        assert taught.forward_s(work) < 1.1 * before


def test_what_is_learnt_at_once_fades_as_often() -> None:
    def learned(*iterations: int) -> float:
        """The machine changes: what is predicted after updates of so many `iterations`, of which the last has news."""
        fit = OnlineFit(1, forgetting=0.9)
        for _ in range(100):
            fit.update([((1.0,), 5e-3)])
        for count in iterations[:-1]:
            fit.update([], count)
        fit.update([((1.0,), 9e-3)], iterations[-1])
        return fit.predict((1.0,))

    assert learned(20) == pytest.approx(learned(*[1] * 20))
    assert learned(20) > 1.1 * learned(1)


@pytest.mark.parametrize("factor", (1.5, 1 / 1.5))
def test_a_machine_that_changes_speed_is_known_within_forty_iterations(taught: CostModel, factor: float) -> None:
    source = random.Random(6)
    teach(taught, source, 40, factor)
    ratios = [taught.forward_s(w) / (factor * true_forward_s(w)) for w in (forward_work(source) for _ in range(50))]
    assert all(0.8 < ratio < 1.25 for ratio in ratios)


def test_the_turnaround_is_a_high_quantile_of_what_was_seen() -> None:
    highest = Highest(0.9, window=100)
    assert highest.seconds == 1e-3
    for n in range(101):
        highest.update(n / 100)
    assert highest.seconds == pytest.approx(0.9)
    for _ in range(100):
        highest.update(0.002)
    assert highest.seconds == 0.002


def test_no_count_makes_work_cheaper() -> None:
    """Measurements that fall with a count, by chance or by confusion, are not believed."""
    fit = OnlineFit(2)
    for n in range(200):
        x = float(n % 10)
        fit.update([((1.0, x), 1e-2 - 5e-4 * x)])
    assert fit.coefficients[1] == 0.0
    assert fit.predict((1.0, 9.0)) == fit.predict((1.0, 0.0)) > 0


def test_a_fit_that_makes_its_sums_lighter_learns_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights grow with every iteration: an engine comes to the point where they are made small again."""

    def learned() -> list[float]:
        made, source = OnlineFit(2), random.Random(0)
        for _ in range(400):
            x = (1.0, source.uniform(1.0, 9.0))
            made.update([(x, (2e-3 + 5e-4 * x[1]) * source.uniform(0.8, 1.2))])
        return made.coefficients

    plain = learned()
    monkeypatch.setattr("coserve_engine.latency.fit.HEAVIEST", 1.5)
    assert learned() == pytest.approx(plain, rel=1e-6)
    monkeypatch.setattr(OnlineFit, "_lighten", lambda self: setattr(self, "_weight", 1.0))
    assert learned() != pytest.approx(plain, rel=1e-3), "the control: sums that keep their weight"


@pytest.mark.parametrize("regime", [None, Regime(knee=128, step=64, full=256)])
def test_a_time_that_a_pause_hid_teaches_nothing(regime: Regime | None) -> None:
    """The clocks of time and pauses are read apart: what is left of a span can be nothing, or less."""
    untouched, hidden = CostModel(regime), CostModel(regime)
    for model in (untouched, hidden):
        teach(model, random.Random(0), 100)
    work, unit = forward_work(random.Random(1)), unit_work(random.Random(1))
    for seconds in (0.0, -0.2):
        hidden.observe(work, seconds, [(unit, seconds)], 0.0)
    assert hidden.forward_s(work) == untouched.forward_s(work)
    assert hidden.unit_bound_s(unit) == untouched.unit_bound_s(unit)
