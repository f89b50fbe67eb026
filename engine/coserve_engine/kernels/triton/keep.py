"""What passes keep of a layer, by one launch for all their windows: where it goes is a table on the device, so that a
captured launch keeps for whatever pass stands there when it is replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl

from coserve_engine.device.protocol import Columns, Device, Staged
from coserve_engine.kernels.triton import lora_tables
from coserve_engine.kernels.triton.launch import Constants, Kernel, cover
from coserve_engine.layout.batch import BatchLayout
from coserve_engine.tensors.passes import PassTensors

NAMES = ("x", "q", "k", "o", "lse", "x2", "gate", "up")
"""Of all that a layer may keep (`tensors.kept`)."""
ROWS, BLOCK = 4, 1024
"""Rows of a program, and 4-byte words that it copies at once."""


@triton.jit
def _copy(
    from_ptr, addresses_ptr, row, at, NAME: tl.constexpr, WIDTH: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """Words [WIDTH] of a row to row `at` of where NAME is kept, if it is."""
    address = tl.load(addresses_ptr + NAME)
    if address != 0:
        if WIDTH % 4 == 0:
            address = tl.multiple_of(address, 16)
        into = address.to(tl.pointer_type(tl.int32)) + at * WIDTH
        for begin in tl.range(0, WIDTH, BLOCK):
            word = begin + tl.arange(0, BLOCK)
            inside = word < WIDTH
            tl.store(into + word, tl.load(from_ptr + row * STRIDE + word, mask=inside), mask=inside)


@triton.jit(do_not_specialize=["layer", "windows"], do_not_specialize_on_alignment=["windows_ptr"])
def _keep(
    x_ptr,  # all in words [T, WIDTH], rows STRIDE apart
    q_ptr,
    k_ptr,
    o_ptr,
    lse_ptr,
    x2_ptr,
    gate_ptr,
    up_ptr,
    windows_ptr,  # int64 [windows, 4]: `put_kept`
    layer,
    windows,
    HIDDEN: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HEADS: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    X_STRIDE: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    O_STRIDE: tl.constexpr,
    LSE_STRIDE: tl.constexpr,
    X2_STRIDE: tl.constexpr,
    GATE_STRIDE: tl.constexpr,
    UP_STRIDE: tl.constexpr,
    COUNT: tl.constexpr,  # of names
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    name = tl.program_id(1)
    for row in tl.range(tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(0).to(tl.int64) * ROWS + ROWS):
        table = row * 0
        at = row * 0
        for n in tl.range(0, windows):
            start = tl.load(windows_ptr + n * 4 + 1)
            inside = (row >= start) & (row < tl.load(windows_ptr + n * 4 + 2))
            table = tl.where(inside, tl.load(windows_ptr + n * 4), table)
            at = tl.where(inside, tl.load(windows_ptr + n * 4 + 3) + row - start, at)
        if table != 0:
            to = table.to(tl.pointer_type(tl.int64)) + layer * COUNT
            if name == 0:
                _copy(x_ptr, to, row, at, 0, HIDDEN, X_STRIDE, BLOCK)
            elif name == 1:
                _copy(q_ptr, to, row, at, 1, QUERIES, Q_STRIDE, BLOCK)
            elif name == 2:
                _copy(k_ptr, to, row, at, 2, KEYS, K_STRIDE, BLOCK)
            elif name == 3:
                _copy(o_ptr, to, row, at, 3, QUERIES, O_STRIDE, BLOCK)
            elif name == 4:
                _copy(lse_ptr, to, row, at, 4, HEADS, LSE_STRIDE, BLOCK)
            elif name == 5:
                _copy(x2_ptr, to, row, at, 5, HIDDEN, X2_STRIDE, BLOCK)
            elif name == 6:
                _copy(gate_ptr, to, row, at, 6, INTERMEDIATE, GATE_STRIDE, BLOCK)
            else:
                _copy(up_ptr, to, row, at, 7, INTERMEDIATE, UP_STRIDE, BLOCK)


KEEP = Kernel(_keep)


@dataclass(frozen=True, slots=True)
class KeptTables:
    """Of live passes that train, int64 [layers, NAMES]: the address of what each layer keeps, or 0; made once a pass,
    and forgotten with it.
    """

    passes: WeakKeyDictionary[PassTensors, torch.Tensor] = field(default_factory=WeakKeyDictionary)

    def of(self, state: PassTensors, device: Device) -> torch.Tensor:
        found = self.passes.get(state)
        if found is None:
            addresses = [_addresses(layer) for layer in state.kept]
            found = self.passes[state] = device.stage(addresses, torch.int64)
        return found

    def put(
        self, layout: BatchLayout, passes: Mapping[int, PassTensors], device: Device, columns: Columns
    ) -> Callable[[Staged], torch.Tensor]:
        """Windows [n, 4] of passes that train, put among what will be staged: address of the pass's table, first row of
        the batch, the one behind the last, first row of the pass.
        """
        windows = [
            number
            for pass_id, start, stop, first in layout.windows
            if passes[pass_id].layout.training
            for number in (lora_tables.address_of(self.of(passes[pass_id], device)), start, stop, first)
        ]
        at = columns.ints(windows)
        return lambda staged: staged.ints[at].view(-1, 4)


def _addresses(kept: Mapping[str, torch.Tensor]) -> list[int]:
    return [lora_tables.address_of(kept[name]) if name in kept else 0 for name in NAMES]


def keep(layer: int, values: Mapping[str, torch.Tensor], windows: torch.Tensor) -> None:
    """Copy what a layer's tables want of `values` [T, ...], by name, to the passes of `windows` [n, 4]."""
    words = [_words(values[name]) for name in NAMES]
    x, q, k, _, lse, _, gate, _ = words
    widths = (x.shape[1], q.shape[1], k.shape[1], lse.shape[1], gate.shape[1])
    constants = _constants(widths, tuple([each.stride(0) for each in words]))
    KEEP.launch((cover(x.shape[0], ROWS), len(NAMES)), constants, *words, windows, layer, windows.shape[0])


@cache
def _constants(widths: tuple[int, ...], strides: tuple[int, ...]) -> Constants:
    named = dict(zip(("HIDDEN", "QUERIES", "KEYS", "HEADS", "INTERMEDIATE"), widths, strict=True))
    named |= {f"{name.upper()}_STRIDE": stride for name, stride in zip(NAMES, strides, strict=True)}
    return Constants(**named, COUNT=len(NAMES), ROWS=ROWS, BLOCK=BLOCK)


def _words(x: torch.Tensor) -> torch.Tensor:
    """Rows [T, ...], which may be apart, as 4-byte words [T, n]."""
    return x.flatten(1).view(torch.int32)
