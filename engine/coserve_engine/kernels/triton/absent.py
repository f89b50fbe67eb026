"""A GPU that is not there, as Triton's driver: kernels are compiled for it by the code that compiles them on one, with
the keys under which a start on such a GPU looks for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Architectures, and bytes of shared memory that a program of each may have (CUDA C++ Programming Guide, table of
technical specifications).
"""


class _Utils:
    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED[self._arch]}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills, threads."""
        return 0, 0, 0, 0, 1024


class Absent:
    """What Triton and `launch` ask of a driver; a launch does nothing."""

    def __init__(self, arch: int) -> None:
        self.arch, self.utils = arch, _Utils(arch)

    def get_current_device(self) -> int:
        return self.arch  # what was compiled for another is not found

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: None


@contextmanager
def absent(arch: int) -> Iterator[None]:
    """Triton compiles for an sm_`arch`, and launches nothing."""
    before = driver._active
    driver.set_active(Absent(arch))
    try:
        yield
    finally:
        driver.set_active(before)
