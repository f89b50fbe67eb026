"""Kernels compiled for a GPU that is not here, as launched on tensors without values, and what they take of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from coserve_engine.kernels.triton import launch
from coserve_engine.kernels.triton.launch import Constants, Kernel

SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
"""Bytes of a multiprocessor of each architecture."""
REGISTERS, WARPS, BLOCKS, RESERVED = 65536, 64, 32, 1024
BLACKWELL = pytest.param(100, marks=pytest.mark.nightly)
"""An architecture for which most is compiled nightly."""
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.int8: "*i8",
    torch.bool: "*i1",
}
TENSOR_CORES = re.compile(r"\b(?:HGMMA|HMMA|UTCHMMA|UTCMMA)\b")
ATOMICS = re.compile(r"\b(?:(?:ATOM|ATOMG|RED|REDG)\b|ATOMS\b(?!\.(?:AND|OR)\b))")
"""But for those that take and give back an sm_100's tensor memory: bits of a word that is the program's own."""
NARROW_LOADS = re.compile(r"\b(?:LDG|LDGSTS)\.\S*\b(?:U8|S8|U16|S16)\b")
WIDE_LOADS = re.compile(r"\b(?:LDG|LDGSTS)\.\S*128\b")


@dataclass(frozen=True)
class Launched:
    """A launch: `types` are of the arguments, by name, `even` of those the ones that divide by 16."""

    kernel: Kernel
    types: tuple[tuple[str, str], ...]
    even: frozenset[str]
    constants: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        """module.function."""
        return f"{self.kernel.function.__module__.rpartition('.')[2]}.{self.kernel.function.__name__}"


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes.

    Args:
        spills: instructions that store or load registers.
        blocks: programs that one multiprocessor holds.
        pipeline: sizes of the buffers that loads go to ahead, each with how many there are.
    """

    registers: int
    spills: int
    shared: int
    blocks: int
    tensor_cores: Counter[str] = field(default_factory=Counter)
    atomics: int = 0
    narrow_loads: int = 0
    wide_loads: int = 0
    pipeline: tuple[str, ...] = ()


@contextmanager
def recorded() -> Iterator[Set[Launched]]:
    """The kinds of launches that are asked for, none of which is run."""
    found: dict[Launched, None] = {}

    def record(kernel: Kernel, grid: Any, arguments: tuple[Any, ...], constants: Constants) -> None:
        found[_launched(kernel, arguments, constants.named)] = None

    with mock.patch.object(launch, "run", record):
        yield found.keys()


def launches(function: Callable[[], object]) -> list[Launched]:
    """Those of a function of kernels, each kind once; it makes its tensors itself, on "cuda"."""
    with recorded() as found, FakeTensorMode(allow_non_fake_inputs=True):
        function()
    return list(found)


def _launched(kernel: Kernel, arguments: tuple[Any, ...], constants: dict[str, Any]) -> Launched:
    names = [name for name in kernel.function.arg_names if name not in constants]
    assert len(names) == len(arguments), f"{kernel.function}: {names} for {len(arguments)} arguments"
    parameters = kernel.function.params
    plain = {parameter.name for parameter in parameters if parameter.do_not_specialize}
    anywhere = {parameter.name for parameter in parameters if parameter.do_not_specialize_on_alignment}
    types, even = [], set()
    for name, value in zip(names, arguments, strict=True):
        if isinstance(value, torch.Tensor):
            types.append((name, TYPES[value.dtype]))
            if name not in anywhere and value.storage_offset() * value.dtype.itemsize % 16 == 0:
                even.add(name)
        elif isinstance(value, float):
            types.append((name, "fp32"))
        else:
            assert name in plain, f"{kernel.function}: {name} is a number that a launch would be compiled for"
            types.append((name, "i32" if abs(value) < 1 << 31 else "i64"))
    return Launched(kernel, tuple(types), frozenset(even), tuple(sorted(constants.items())))


def compile_for(arch: int, launched: Launched) -> Usage:
    """Compile it for sm_`arch`."""
    function, types = launched.kernel.function, dict(launched.types)
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    even = {(n,): [["tt.divisibility", 16]] for n, name in enumerate(function.arg_names) if name in launched.even}
    source = ASTSource(function, signature, dict(launched.constants), even)
    options = {"num_warps": launched.kernel.warps, "num_stages": launched.kernel.stages}
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return _usage(made, arch)


def _usage(made: Any, arch: int) -> Usage:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        resources, code = (_cuobjdump(flag, file.name) for flag in ("-res-usage", "-sass"))
    registers = _number(r"REG:(\d+)", resources)
    warps, shared = made.metadata.num_warps, made.metadata.shared
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256 * warps)
    blocks = min(by_registers, SHARED[arch] // (shared + RESERVED), WARPS // warps, BLOCKS)
    buffers = re.findall(r"ttg\.local_alloc.*memdesc<([0-9x]+x[a-z0-9]+)", made.asm["ttgir"])
    return Usage(
        registers,
        len(re.findall(r"\b(?:STL|LDL)\b", code)),
        shared,
        blocks,
        Counter(TENSOR_CORES.findall(code)),
        len(ATOMICS.findall(code)),
        len(NARROW_LOADS.findall(code)),
        len(WIDE_LOADS.findall(code)),
        tuple(buffers),
    )


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match is not None, text
    return int(match[1])


def _cuobjdump(flag: str, path: str) -> str:
    done = subprocess.run([knobs.nvidia.cuobjdump.path, flag, path], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
