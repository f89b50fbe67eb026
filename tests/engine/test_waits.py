"""No iteration waits for the device or copies from memory that is not pinned, whatever is in it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import waits
from tables import use_torch
from waits import Waits

from coserve_engine.config import LINEARS
from coserve_engine.device.cpu import CpuDevice
from coserve_engine.messages import (
    AddRequest,
    ForwardBackward,
    LoraSpec,
    OptimStep,
    Pass,
    PassDone,
    PassMode,
    SamplingParams,
    StartJob,
    StepDone,
    TrainSeq,
)


def requests(clock: Any) -> tuple[AddRequest, ...]:
    """Greedy, drawn in each way, with processors, with log-probabilities of choices and prompt."""
    kinds = (
        (20, {"temperature": 0.0}),
        (90, {"seed": 1, "temperature": 1.0}),
        (30, {"seed": 2, "temperature": 1.0, "top_p": 0.9, "min_p": 0.01}),
        (12, {"seed": 3, "temperature": 0.7, "top_k": 5, "repetition_penalty": 1.2, "frequency_penalty": 0.1}),
        (9, {"temperature": 0.0, "logprobs": 2}),
        (70, {"temperature": 0.0, "prompt_logprobs": 1}),
        (8, {"temperature": 0.0, "logit_bias": ((5, 1.0),), "min_tokens": 3}),
    )
    return tuple(
        AddRequest(str(n), tuple(range(3, 3 + length)), SamplingParams(max_tokens=12, **params), clock())
        for n, (length, params) in enumerate(kinds)
    )


def mixed(driver: Any) -> dict[tuple[str, str], int]:
    """The most of each kind at each place in one iteration of a run with everything in it."""
    ones = (1.0,) * 100
    seqs = (TrainSeq(0, tuple(range(3, 103)), ones), TrainSeq(1, tuple(range(3, 43)), ones[:40]))
    spec = LoraSpec(4, 8.0, LINEARS)
    driver.submit(StartJob("job", spec, 1, None))
    driver.step()
    driver.submit(
        ForwardBackward("job", 1, Pass(1, "job", 0, 0, seqs, PassMode.TRAIN)),
        OptimStep("job", 2, 1e-3, max_grad_norm=1.0),
        ForwardBackward("job", 3, Pass(2, "job", 0, 0, seqs, PassMode.EVAL), want_logprobs=True),
        *requests(driver.clock),
    )
    most: Counter[tuple[str, str]] = Counter()
    for _ in range(2000):
        if driver.engine.idle:
            break
        with Waits() as seen:
            driver.step()
        most |= seen.found
    assert not driver.failures
    assert len(driver.of(PassDone)) == 2
    assert driver.one(StepDone).step == 1
    return dict(most)


def test_nothing_waits(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    use_torch(monkeypatch)
    assert mixed(driver(jitter_s=1e-5)) == {}


def test_a_forward_is_one_copy(driver: Any, draw_tokens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, pages, adapters and choices of a batch go to the device at once, whatever their number."""
    use_torch(monkeypatch)
    d = driver(jitter_s=1e-5)
    d.submit(*requests(d.clock))
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
