"""The times of a request that its answer carries."""

from __future__ import annotations

from coserve_agent.telemetry.timing import timing


def test_times_are_those_of_vllm() -> None:
    assert timing(10.0, 10.5, [10.75, 11.0, 12.25]) == {
        "time_to_first_token_ms": 250.0,
        "generation_time_ms": 1500.0,
        "queue_time_ms": 500.0,
        "mean_itl_ms": 750.0,
        "tokens_per_second": round(3 / 1.75, 3),
    }


def test_one_token_has_no_gap_and_none_has_no_time() -> None:
    one = timing(1.0, 1.0, [2.0])
    assert (one["mean_itl_ms"], one["generation_time_ms"], one["tokens_per_second"]) == (None, 0.0, 1.0)
    none = timing(1.0, 2.0, [])
    assert none.pop("queue_time_ms") == 1000.0
    assert set(none.values()) == {None}
    assert timing(1.0, 1.0, [1.0])["tokens_per_second"] is None
