"""Passes take over each other's memory, and nothing of what was in it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from coserve_engine.messages import Pass, StopJob, TrainSeq
from coserve_engine.tensors.buffers import ALIGN, Buffers
from coserve_engine.tensors.lora import LoraLayout

CPU, F32 = torch.device("cpu"), torch.float32


def test_buffers_have_their_shapes_apart_and_aligned() -> None:
    shapes = [(3, 5), (7,), (2, 3, 4), (0, 4)]
    dtypes = (torch.float64, torch.bfloat16, torch.float32, torch.int64)
    parts = Buffers(CPU).lease(1, list(zip(shapes, dtypes, strict=True)))
    assert [tuple(part.shape) for part in parts] == shapes
    assert tuple(part.dtype for part in parts) == dtypes
    for number, part in enumerate(parts):
        assert part.is_contiguous()
        assert part.storage_offset() * part.itemsize % ALIGN == 0
        part.fill_(number)
    assert all((part == number).all() for number, part in enumerate(parts))


def test_a_block_is_leased_again_when_it_is_given_back() -> None:
    buffers = Buffers(CPU)
    (first,) = buffers.lease(1, [((32,), F32)])
    (second,) = buffers.lease(2, [((64,), F32)])
    assert first.data_ptr() != second.data_ptr()
    for owner in (2, 1):
        buffers.release(owner)
    (third,) = buffers.lease(3, [((16,), F32)])
    assert third.data_ptr() == first.data_ptr(), "the smallest that fits"
    (fourth,) = buffers.lease(4, [((48,), F32)])
    assert fourth.data_ptr() == second.data_ptr()


def test_there_are_never_more_blocks_than_owners_at_once() -> None:
    buffers = Buffers(CPU)
    for owner, size in enumerate((32, 64, 48, 128, 16)):
        buffers.lease(owner, [((size,), F32)])
        buffers.release(owner)
    assert buffers.bytes == 4 * 128
    buffers.clear()
    assert buffers.bytes == 0


def test_clear_leaves_what_is_leased() -> None:
    buffers = Buffers(CPU)
    buffers.lease(1, [((32,), F32)])
    buffers.clear()
    assert buffers.bytes == 4 * 32


@pytest.fixture
def after_another(rig: Any, draw_tokens: Any, random_adapter: Any) -> Any:
    """Gradient of a pass in the memory of another that was longer and left nothing but NaN."""

    def run() -> torch.Tensor:
        r = rig()
        adapter = random_adapter(r.executor)

        def work(length: int) -> Pass:
            return Pass(1, "job", 0, 0, (TrainSeq(0, draw_tokens(1, length), (0.01,) * length),))

        r.run_pass(work(200), adapter)
        (block,) = r.executor.buffers._free
        r.executor.buffers.lease(1, [((block.numel() // 4,), F32)])[0].fill_(torch.nan)
        r.executor.buffers.release(1)
        state = r.run_pass(work(130), adapter)
        assert state.final.untyped_storage().data_ptr() == block.untyped_storage().data_ptr()
        found: torch.Tensor = state.grads
        return found

    return run


def test_a_pass_sees_nothing_of_the_one_before(
    after_another: Any, rig: Any, draw_tokens: Any, random_adapter: Any
) -> None:
    r = rig()
    seqs = (TrainSeq(0, draw_tokens(1, 130), (0.01,) * 130),)
    alone = r.run_pass(Pass(1, "job", 0, 0, seqs), random_adapter(r.executor))
    assert torch.equal(after_another(), alone.grads)


def test_without_clearing_the_gradient_it_does(after_another: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    views = LoraLayout.views

    def as_found(self: LoraLayout, flat: torch.Tensor) -> Any:
        return views(self, flat.fill_(torch.nan) if flat._base is not None else flat)

    monkeypatch.setattr(LoraLayout, "views", as_found)
    assert not torch.isfinite(after_another()).all()


def test_the_memory_is_freed_with_the_last_job(driver: Any, training: Any, start_job: Any) -> None:
    d = driver()
    assert d.engine.executor.buffers.bytes == 0, "the calibration left nothing"
    d.submit(start_job(), *training(steps=1))
    d.run()
    assert d.engine.executor.buffers.bytes > 0
    d.submit(StopJob("job"))
    d.run()
    assert d.engine.executor.buffers.bytes == 0


FAULTS = """
import resource, torch
from coserve_engine.tensors.buffers import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
fresh = torch.ones(3 << 20)
before = faults()
keep_freed_memory()
faults()
print(before, faults())
"""


def test_freed_temporaries_are_not_mapped_anew() -> None:
    """In a process of its own, in which nothing large was freed yet."""
    done = subprocess.run((sys.executable, "-c", FAULTS), check=True, capture_output=True, text=True)
    before, after = map(int, done.stdout.split())
    assert after < before / 10
