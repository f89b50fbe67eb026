"""Queries, keys and values are one product, gate and up another, of weights that are read into one; and adapters change
no bit of a row without one.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tables import use_torch

from coserve_engine.kernels.plain import PlainLinear
from coserve_engine.kernels.protocol import GATE_UP, QKV
from coserve_engine.model import loading
from coserve_engine.scheduler.plan import Kind, Segment

MODELS = ("plain", "llama31", "qwen2", "qwen3")


@pytest.fixture(autouse=True)
def _on_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    use_torch(monkeypatch)


def tensors_of(executor: Any) -> list[torch.Tensor]:
    """All frozen weights and biases by which a forward computes."""
    found = []
    for layer in executor.transformer.weights.layers:
        for linear in (*layer.linears.values(), *layer.fused.values()):
            found += [x for x in (linear.weight, linear.bias) if x is not None]
    return found


@pytest.mark.parametrize("model", MODELS)
def test_a_linear_is_a_slice_of_its_group(rig: Any, model_path: Any, model: str) -> None:
    executor = rig(model_path(model)).executor
    for layer in executor.transformer.weights.layers:
        assert set(layer.fused) == {QKV, GATE_UP}
        for group, fused in layer.fused.items():
            parts = [layer.linears[name] for name in group]
            assert torch.equal(torch.cat([part.weight for part in parts]), fused.weight)
            assert all(part.weight.untyped_storage().data_ptr() == fused.weight.data_ptr() for part in parts)
            biases = [part.bias for part in parts if part.bias is not None]
            assert (fused.bias is None) == (not biases)
            assert not biases or torch.equal(torch.cat(biases), fused.bias)
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors_of(executor)}
    names = [n for n in loading.tensor_shapes(executor.model) if "_proj." in n]
    shapes = loading.tensor_shapes(executor.model)
    assert sum(held.values()) == 4 * sum(torch.Size(shapes[name]).numel() for name in names), "no second copy"


def test_what_was_read_is_gone_when_more_is_read(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tensors that go into a slice at most the last two are there at any time."""
    read, most, seen = loading.read_tensors, 0, 0

    def watched(*args: Any) -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most, seen
        alive: list[weakref.ref[torch.Tensor]] = []
        for name, tensor in read(*args):
            if any(f".{linear}." in name for linear in (*QKV, *GATE_UP)):
                alive.append(weakref.ref(tensor))
                seen += 1
            yield name, tensor
            gc.collect()
            most = max(most, sum(ref() is not None for ref in alive))

    monkeypatch.setattr(loading, "read_tensors", watched)
    gc.freeze()  # what was there before need not be looked through each time
    executor = rig().executor
    gc.unfreeze()
    assert seen == 5 * executor.model.layers
    assert most <= 2


def test_four_products_a_layer(
    rig: Any, draw_tokens: Any, random_adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    products = {"forward": 0, "backward": 0}

    def counted(name: str) -> None:
        real = getattr(PlainLinear, name)

        def spy(self: PlainLinear, x: torch.Tensor) -> torch.Tensor:
            products[name] += 1
            return real(self, x)  # type: ignore[no-any-return]

        monkeypatch.setattr(PlainLinear, name, spy)

    r = rig()
    adapter = random_adapter(r.executor)
    slots = [r.add(draw_tokens(n, 40), adapter if n else None) for n in range(3)]
    counted("forward")
    counted("backward")
    r.forward(*(Segment(Kind.PREFILL, slot, 0, 40, sample=True) for slot in slots))
    assert products == {"forward": 4 * r.executor.model.layers, "backward": 0}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_rows_without_an_adapter_do_not_notice_others(
    rig: Any, model_path: Any, draw_tokens: Any, random_adapter: Any, model: str, dtype: str
) -> None:
    r, length = rig(model_path(model), dtype=dtype), 75

    def logits(adapters: list[Any]) -> torch.Tensor:
        """Of the base's rows, of a prompt and of decode, beside the others'."""
        slots = [r.add(draw_tokens(n, length), adapter) for n, adapter in enumerate((None, *adapters))]
        first = r.forward(*(Segment(Kind.PREFILL, slot, 0, length - 1, sample=True) for slot in slots))
        rest = r.forward(*(Segment(Kind.DECODE, slot, length - 1, 1, sample=True) for slot in slots))
        changed.append(rest[slots[1]])
        return torch.stack([first[slots[0]], rest[slots[0]]])

    changed: list[torch.Tensor] = []
    executor = r.executor
    made = [random_adapter(executor, rank=rank, seed=rank) for rank in (4, 6, 16)]
    assert torch.equal(logits(made), logits([None] * 3))
    assert not torch.equal(*changed), "the adapters did nothing"
