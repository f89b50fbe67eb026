"""No iteration waits for the device or copies from memory that is not pinned, whatever is in it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import waits
from mixed import TIGHT, requests, run
from tables import use_torch
from waits import Waits

from coserve_engine.device.cpu import CpuDevice


def mixed(driver: Any) -> dict[tuple[str, str], int]:
    """The most of each kind at each place in one iteration of a run with everything in it."""
    most: Counter[tuple[str, str]] = Counter()

    def each() -> None:
        nonlocal most
        with Waits() as seen:
            driver.step()
        most |= seen.found

    run(driver, each)
    return dict(most)


def test_nothing_waits(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    use_torch(monkeypatch)
    d = driver(jitter_s=1e-5, **TIGHT)
    assert mixed(d) == {}
    assert d.engine.requests.preemptions > 0


def test_a_forward_is_one_copy(driver: Any, draw_tokens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, pages, adapters and choices of a batch go to the device at once, whatever their number."""
    use_torch(monkeypatch)
    d = driver(jitter_s=1e-5)
    d.submit(*(replace(one, adapter=None) for one in requests(d.clock)))
    d.step()
    staged: list[int] = []
    for name in ("stage", "stage_columns"):
        real = getattr(CpuDevice, name)

        def spy(self: Any, *args: Any, real: Any = real) -> Any:
            staged[-1] += 1
            return real(self, *args)

        monkeypatch.setattr(CpuDevice, name, spy)
    for _ in range(8):
        staged.append(0)
        d.step()
    assert staged == [1] * 8


def _number(x: torch.Tensor) -> object:
    return float(x.sum())


def _truth(x: torch.Tensor) -> object:
    return bool(x.isfinite().all())


def _numbers(x: torch.Tensor) -> object:
    return x.tolist()


def _marked(x: torch.Tensor) -> object:
    return x[x > 0]


def _marked_set(x: torch.Tensor) -> object:
    x[x > 0] = 1.0
    return x


def _listed(x: torch.Tensor) -> object:
    return x[[0, 1]]


def _made(x: torch.Tensor) -> object:
    return torch.tensor([1.0, 2.0], device=x.device)


def _repeated(x: torch.Tensor) -> object:
    return x.repeat_interleave(torch.ones(4, dtype=torch.int64), 0)


def _found(x: torch.Tensor) -> object:
    return x.nonzero()


@pytest.mark.parametrize(
    "bad",
    [_number, _truth, _numbers, _marked, _marked_set, _listed, _made, _repeated, _found],
    ids=lambda f: f.__name__,
)
def test_a_wait_that_is_added_is_seen(bad: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: each way to wait or to copy, as if it stood in a kernel."""
    monkeypatch.setattr(waits, "place", lambda: "kernels/torch/table.added")
    x = torch.ones(4, 4)
    with Waits() as seen:
        bad(x)
    assert {at for _, at in seen.found} == {"kernels/torch/table.added"}


def test_what_waits_for_nothing_is_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control's control."""
    monkeypatch.setattr(waits, "place", lambda: "kernels/torch/table.added")
    x, at = torch.ones(4, 4), torch.zeros(2, dtype=torch.int64)
    with Waits() as seen:
        x[at] = x[at] * 2
        x[1:].zero_()
        x.masked_fill_(x > 0, 0.0).where(x > 0, 1.0).topk(2)
        x.repeat_interleave(2, 0).sort(stable=True)
    assert not seen.found
