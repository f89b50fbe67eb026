"""The optimizer step that no host waits for is that of torch.optim.AdamW with clip_grad_norm_, and skips by itself."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from waits import Waits

from coserve_engine.kernels.cpu import optim as cpu
from coserve_engine.kernels.torch.optim import adamw
from coserve_engine.tensors.adam import AdamState, AdamW

HOW = AdamW(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, max_grad_norm=1.0)
SIZE = 1000


def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
    """Some over the norm, some under it, some that are not clipped at all by a float's error."""
    torch.manual_seed(1)
    scales = (1.0, 1e-3, 30.0, 1e-6, 1 / math.sqrt(SIZE))
    return [scale * torch.randn(SIZE, dtype=dtype) for scale in scales]


def start(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(SIZE, dtype=dtype, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("how", [HOW, replace(HOW, max_grad_norm=0.0), replace(HOW, max_grad_norm=1e-3)], ids=repr)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.float64, 1e-7)], ids=str)
def test_steps_are_those_of_torch(how: AdamW, dtype: torch.dtype, error: float) -> None:
    """`updates` is float32, so float64's corrections of bias are not closer."""
    ours, reference = start(dtype), torch.nn.Parameter(start(dtype))
    theirs = torch.optim.AdamW(
        [reference], lr=how.lr, betas=(how.beta1, how.beta2), eps=how.eps, weight_decay=how.weight_decay
    )
    state = AdamState.zeros(ours)
    for grad in gradients(dtype):
        reference.grad = grad.clone()
        limit = how.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_([reference], limit)
        theirs.step()
        found, changed = adamw(ours, grad, state, how).tolist()
        assert changed == 1
        assert found == pytest.approx(norm.item(), rel=1e-6)
    assert state.updates == 5
    assert torch.allclose(ours, reference.detach(), rtol=0, atol=error)
    assert not torch.allclose(ours, start(dtype), rtol=0, atol=1e3 * error)


@pytest.mark.parametrize("table", ["torch", "cpu"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_gradient_that_is_not_finite_changes_nothing(table: str, bad: float) -> None:
    """And the next step is as if there had been none."""
    param, state = start(torch.float32), AdamState.zeros(start(torch.float32))
    first, second, *_ = gradients(torch.float32)

    def step(grad: torch.Tensor) -> tuple[float, bool]:
        if table == "cpu":
            return cpu.adamw(param, grad, state, HOW)
        norm, changed = adamw(param, grad, state, HOW).tolist()
        return norm, bool(changed)

    assert step(first.clone())[1]
    before, was = param.clone(), state.copy()
    poisoned = second.clone()
    poisoned[7] = bad
    norm, changed = step(poisoned)
    assert not changed
    assert not math.isfinite(norm)
    assert torch.equal(param, before)
    assert torch.equal(state.m, was.m)
    assert torch.equal(state.v, was.v)
    assert state.updates == was.updates == 1
    assert step(second)[1]
    assert state.updates == 2
    assert not torch.equal(param, before)


def test_no_host_value() -> None:
    """On tensors that say they are a GPU's, where each look at a value raises; the CPU's step is the control."""
    with FakeTensorMode():
        param = torch.empty(SIZE, device="cuda")
        state, grad = AdamState.zeros(param), torch.empty_like(param)
        assert adamw(param, grad, state, HOW).device.type == "cuda"
        with pytest.raises(RuntimeError, match="local_scalar"):
            cpu.adamw(param, grad, state, HOW)


def test_no_wait() -> None:
    """The same on a CPU, by the operators."""
    param = start(torch.float32)
    state, (grad, *_) = AdamState.zeros(param), gradients(torch.float32)
    with Waits() as seen:
        adamw(param, grad, state, HOW)
    assert not seen.found
    with Waits() as control:
        cpu.adamw(param, grad, state, HOW)
    assert control.found
