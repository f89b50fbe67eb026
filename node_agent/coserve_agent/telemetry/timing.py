"""The times of one request as its answer may carry them: vLLM's names and meanings."""

from __future__ import annotations

from collections.abc import Sequence


def timing(arrival_s: float, placed_s: float, emitted_s: Sequence[float]) -> dict[str, float | None]:
    """Of a request that got a place in a batch at `placed_s` and whose tokens the engine had at `emitted_s`; None for
    what so many tokens do not have.

    Milliseconds; the tokens per second are all of them over the time since `placed_s`.
    """
    first, last = (emitted_s[0], emitted_s[-1]) if emitted_s else (None, None)
    decode_s = None if first is None or last is None else last - first
    gaps = len(emitted_s) - 1
    whole_s = 0.0 if last is None else last - placed_s
    return {
        "time_to_first_token_ms": None if first is None else _ms(first - placed_s),
        "generation_time_ms": None if decode_s is None else _ms(decode_s),
        "queue_time_ms": _ms(placed_s - arrival_s),
        "mean_itl_ms": None if decode_s is None or gaps < 1 else _ms(decode_s / gaps),
        "tokens_per_second": round(len(emitted_s) / whole_s, 3) if whole_s > 0 else None,
    }


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)
