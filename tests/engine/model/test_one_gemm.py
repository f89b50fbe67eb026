"""A mixed batch meets each frozen weight once: decode, prefill and finetuning of all adapters share the GEMM."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from coserve_engine.config import LINEARS
from coserve_engine.kernels.cpu.linears import PackedLinear
from coserve_engine.messages import Pass, TrainSeq
from coserve_engine.scheduler.plan import Kind, Segment
from coserve_engine.tensors.weights import FrozenLinear

GEMMS = ("mm", "addmm", "linear", "bmm", "baddbmm", "matmul", "_linear_pointwise")


class Gemms(TorchDispatchMode):
    """Counts matrix products by the frozen weight they read."""

    def __init__(self, weights: dict[int, str]) -> None:
        super().__init__()
        self._weights = weights
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in GEMMS:
            for argument in args:
                if isinstance(argument, torch.Tensor) and address(argument) in self._weights:
                    self.count[self._weights[address(argument)]] += 1
        return func(*args, **(kwargs or {}))


def frozen(executor: Any) -> dict[int, str]:
    weights = executor.transformer.weights
    linears = {f"{i}.{n}": layer.linears[n] for i, layer in enumerate(weights.layers) for n in LINEARS}
    return {address(read_by(linear)): name for name, linear in {**linears, "head": weights.head}.items()}


def address(tensor: torch.Tensor) -> int:
    """The same for a weight and its transpose; a packed one has no storage to look at."""
    return id(tensor) if tensor.is_mkldnn else tensor.data_ptr()


def read_by(linear: FrozenLinear) -> torch.Tensor:
    """The tensor that its forward reads; which kind of linear is used depends on the processor."""
    return linear._forward if isinstance(linear, PackedLinear) else linear._weight


def test_one_gemm_a_linear(rig: Any, draw_tokens: Any, random_adapter: Any) -> None:
    r = rig()
    adapters = [random_adapter(r.executor, rank=rank, seed=rank) for rank in (4, 16)]
    decoding, prompt = r.add(draw_tokens(1, 40), adapters[0]), r.add(draw_tokens(2, 130), adapters[1])
    base = r.add(draw_tokens(3, 20))
    r.forward(Segment(Kind.PREFILL, decoding, 0, 39))
    state = r.open(Pass(1, "job", 0, 0, (TrainSeq(0, draw_tokens(4, 150), (1.0,) * 150),)), adapters[0])
    segments = (
        Segment(Kind.DECODE, decoding, 39, 1, sample=True),
        Segment(Kind.PREFILL, prompt, 0, 130, sample=True),
        Segment(Kind.PREFILL, base, 0, 20, sample=True),
        r.window(state, 2),
    )
    names = frozen(r.executor)
    assert len(names) == r.executor.model.layers * 7 + 1
    with Gemms(names) as gemms:
        r.forward(*segments)
    assert gemms.count == dict.fromkeys(names.values(), 1)
    with Gemms(names) as gemms:
        for segment in segments[:3]:
            r.forward(segment)
    assert gemms.count == dict.fromkeys(names.values(), 3), "the count sees every product"
