"""How a kernel is launched: compiled once for each kind of launch, and from then on without Triton's own launcher, to
which it takes twice as long to find out that nothing is new.

Sizes and strides of a model's tensors are constants of a kernel: of a stride that it did not know to divide by 16 it
would load two bytes at a time. What changes from one iteration to the next is a table on the device or a number that
nothing is specialised for (`do_not_specialize`): a launch must find its kernel compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, reduce
from operator import attrgetter, or_
from typing import Any

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

Ready = Callable[..., None]
"""Takes the grid's three numbers, then addresses and numbers of the arguments, then the constants."""
EVEN = 15
"""An address without these bits can be read 16 bytes at a time."""
_ADDRESS, _DTYPE = torch.Tensor.data_ptr, attrgetter("dtype")
_FLAT = ((1, 1, 1), (1, 1), (1,), ())
"""What a grid of so many numbers lacks."""


class Constants:
    """What a function's `tl.constexpr` are, by name. To hash them takes a microsecond, so a word makes them once for
    each model and strides (`functools.cache`); those that were made anew are the same to a kernel.
    """

    __slots__ = ("_hash", "named", "values")

    def __init__(self, **named: Any) -> None:
        self.named, self.values, self._hash = named, tuple(named.values()), hash(tuple(named.items()))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constants) and self.named == other.named


class Kernel:
    """A function of `triton.jit`, and what it is compiled with: `warps` of a program, `stages` of its loops' loads.

    Its pointers (`x_ptr`) come first, then numbers, then what is `tl.constexpr`; `tensors`: how many pointers.
    `ready` are the kinds of launches that it was compiled for; `aligned`: the pointers for which it matters whether
    they can be read 16 bytes at a time, as they do not begin anywhere (`do_not_specialize_on_alignment`).
    """

    __slots__ = ("aligned", "function", "interpreted", "ready", "stages", "tensors", "warps")

    def __init__(self, function: Any, warps: int = 4, stages: int = 3) -> None:
        self.function, self.warps, self.stages = function, warps, stages
        self.ready: dict[tuple[object, ...], Ready] = {}
        self.interpreted = not isinstance(function, JITFunction)
        pointers = () if self.interpreted else [one for one in function.params if one.name.endswith("_ptr")]
        self.tensors = len(pointers)
        if any(one.num >= self.tensors for one in pointers):
            raise TypeError(f"{function.__name__}: pointers must come before numbers")
        self.aligned = tuple(one.num for one in pointers if not one.do_not_specialize_on_alignment)
        _KERNELS.append(self)

    def launch(self, grid: tuple[int, ...], constants: Constants, *arguments: Any) -> None:
        """Run a program for each place of `grid`, unless there is none. `arguments`: tensors and numbers, in the order
        of the function's own.
        """
        if 0 not in grid:
            run(self, grid, arguments, constants)


_KERNELS: list[Kernel] = []


@cache
def kernel_of(function: Any, warps: int, stages: int) -> Kernel:
    """The kernel of a function that is compiled with these."""
    return Kernel(function, warps, stages)


def cover(count: int, size: int) -> int:
    """Blocks of `size` that cover so many; `triton.cdiv` takes microseconds."""
    return -(-count // size)


def power_of_two(least: int) -> int:
    """The smallest that is not less."""
    return 1 << (least - 1).bit_length()


def compiled() -> int:
    """Kinds of launches that a kernel was compiled for, or loaded from Triton's cache, in this process."""
    return sum(len(kernel.ready) for kernel in _KERNELS)


def run(kernel: Kernel, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: Constants) -> None:
    """Launch what was compiled for this kind of arguments; where none was like them it is compiled now."""
    if kernel.interpreted:
        kernel.function[grid](*arguments, **constants.named)
        return
    tensors = arguments[: kernel.tensors]
    addresses, key = [*map(_ADDRESS, tensors)], (constants, *map(_DTYPE, tensors))
    if reduce(or_, addresses) & EVEN and any(addresses[n] & EVEN for n in kernel.aligned):
        key += (tuple([n for n in kernel.aligned if addresses[n] & EVEN]),)
    ready = kernel.ready.get(key)
    if ready is None:
        ready = kernel.ready[key] = prepared(kernel, grid, arguments, constants)
    ready(*grid, *_FLAT[len(grid)], *addresses, *arguments[kernel.tensors :], *constants.values)


def prepared(kernel: Kernel, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: Constants) -> Ready:
    """Compile it for these, on the current device, and load it."""
    options = {"num_warps": kernel.warps, "num_stages": kernel.stages}
    made = kernel.function.run(*arguments, grid=grid, warmup=True, **constants.named, **options)
    launcher, device = made.run, driver.active.get_current_device()  # it is loaded by that
    function, metadata, stream = made.function, made.packed_metadata, driver.active.get_current_stream

    def ready(x: int, y: int, z: int, *values: Any) -> None:
        launcher(x, y, z, stream(device), function, metadata, None, None, None, *values)

    return ready
