"""Triton's interpreter as a GPU would compute: made right for bfloat16, and watched.

Triton 3.6 keeps bfloat16 as uint16; it multiplies the bit patterns in tl.dot, cuts off where hardware rounds to nearest
even, and computes all else on the patterns. The first two are repaired here and the third is refused: a kernel must say
`.to(tl.float32)` before it computes. Dots are in float64, rounded once: numpy's BLAS gives a row other bits at another
place of its block.

Programs of a launch run in an order that `order` draws, and what each stores and loads is recorded where `watch` asks.
"""

from __future__ import annotations

import inspect
import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton.language as tl
from triton.language import core
from triton.runtime import interpreter

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle


def widen(bits: Any) -> Any:
    """bfloat16's bits as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: Any) -> Any:
    """float32 -> bfloat16's bits, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


_cast, _dot, _binary, _unary, _fma = (
    Builder.cast_impl,
    Builder.create_dot,
    Builder.binary_op,
    Builder.unary_op,
    Builder.create_fma,
)
_load, _store = Builder.create_masked_load, Builder.create_masked_store


def _cast_impl(self: Any, source: Any, into: Any) -> Any:
    a, b = source.dtype.scalar, into.scalar
    if a == tl.bfloat16 and b == tl.float32:
        return Handle(widen(source.data), tl.float32)
    if a == tl.float32 and b == tl.bfloat16:
        return Handle(narrow(source.data), tl.bfloat16)
    if tl.bfloat16 in (a, b) and a != b:
        raise TypeError(f"{a} -> {b}: go by float32")
    return _cast(self, source, into)


def _create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
    if not a.dtype.is_floating():
        return _dot(self, a, b, d, precision, imprecise)
    if a.data.shape[-1] < 16:
        raise ValueError(f"a GPU wants K >= 16, not {a.data.shape[-1]}")
    x, y = (widen(h.data) if h.dtype.scalar == tl.bfloat16 else h.data for h in (a, b))
    total = np.matmul(x.astype(np.float64), y.astype(np.float64)) + d.data
    return Handle(total.astype(d.data.dtype), d.dtype.scalar)


def _refuse(*handles: Any) -> None:
    for handle in handles:
        of = handle.dtype
        if not isinstance(of, tl.pointer_type) and getattr(of, "scalar", of) == tl.bfloat16:
            raise TypeError("arithmetic on bfloat16: say .to(tl.float32) first")


def _binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
    _refuse(left, right)
    return _binary(self, left, right, op)


def _unary_op(self: Any, argument: Any, op: Any) -> Any:
    _refuse(argument)
    return _unary(self, argument, op)


def _create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    _refuse(x, y, z)
    return _fma(self, x, y, z)


class Watch:
    """Addresses that programs of the launches in its scope stored to and loaded from."""

    def __init__(self) -> None:
        self.launches: list[dict[tuple[int, int, int], tuple[set[int], set[int]]]] = []

    def _at(self, program: tuple[int, int, int]) -> tuple[set[int], set[int]]:
        return self.launches[-1].setdefault(program, (set(), set()))

    def clashes(self) -> list[str]:
        """Of two programs of one launch: both stored at one address, or one loaded what another stored."""
        found = []
        for number, launch in enumerate(self.launches):
            owner: dict[int, tuple[int, int, int]] = {}
            for program, (stored, _) in launch.items():
                twice = [address for address in stored if owner.setdefault(address, program) != program]
                found += [f"launch {number}: {owner[at]} and {program} store at {at:#x}" for at in twice]
            for program, (_, loaded) in launch.items():
                others = [address for address in loaded & owner.keys() if owner[address] != program]
                found += [f"launch {number}: {program} loads what {owner[at]} stores at {at:#x}" for at in others]
        return found


class _Now:
    """What runs at the moment, in which order programs do, and who watches."""

    program = (0, 0, 0)
    order = random.Random(0)
    watch: Watch | None = None


def _masked(pointers: Any, mask: Any) -> set[int]:
    data, here = np.broadcast_arrays(pointers.data, mask.data)
    return {int(address) for address in data[here.astype(bool)]}


def _masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
    if _Now.watch is not None:
        _Now.watch._at(_Now.program)[1].update(_masked(pointers, mask))
    return _load(self, pointers, mask, *rest)


def _masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
    if _Now.watch is not None:
        _Now.watch._at(_Now.program)[0].update(_masked(pointers, mask))
    return _store(self, pointers, value, mask, *rest)


def _call(self: Any, *args: Any, **kwargs: Any) -> None:
    """Of tensors where they are: nothing is copied."""
    known = inspect.getfullargspec(self.fn).args
    bound = inspect.getcallargs(self.fn, *args, **{name: value for name, value in kwargs.items() if name in known})
    arguments = {
        name: value if name in self.constexprs else interpreter._implicit_cvt(value) for name, value in bound.items()
    }
    grid = (*self.grid, 1, 1)[:3]
    interpreter.interpreter_builder.set_grid_dim(*grid)
    programs = list(itertools.product(*map(range, grid)))
    _Now.order.shuffle(programs)
    if _Now.watch is not None:
        _Now.watch.launches.append({})
    with np.errstate(all="ignore"):  # rows that are masked may divide by zero, as they do on a GPU
        for program in programs:
            _Now.program = program
            interpreter.interpreter_builder.set_grid_idx(*program)
            self.fn(**arguments)


def order(seed: int) -> None:
    """Programs run in another order from now on."""
    _Now.order.seed(seed)


@contextmanager
def watch() -> Iterator[Watch]:
    """Record what the programs of launches store and load."""
    _Now.watch = Watch()
    try:
        yield _Now.watch
    finally:
        _Now.watch = None


def _patch_tensor(tensor: Any, scope: Any) -> None:
    _tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


_tensor = interpreter._patch_lang_tensor


class _Done:
    def restore(self) -> None:
        """Nothing: this process only interprets."""


def install() -> None:
    """Make it so for this process. The interpreter would put its functions into triton.language at each launch and each
    call of a device function, which takes nearly all of its time: once is enough.
    """
    interpreter._patch_lang_tensor = _patch_tensor
    interpreter.GridExecutor.__call__ = _call
    Builder.cast_impl, Builder.create_dot = _cast_impl, _create_dot
    Builder.binary_op, Builder.unary_op, Builder.create_fma = _binary_op, _unary_op, _create_fma
    Builder.create_masked_load, Builder.create_masked_store = _masked_load, _masked_store

    def language() -> tuple[Any, Any]:
        """Sees both modules that kernels compute by: `tl`, and `core`, which tl.sum and its like use."""
        return tl, core

    interpreter._patch_lang(language)
    interpreter._patch_lang = lambda function: _Done()
