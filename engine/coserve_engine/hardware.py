"""What there is to compute on: whether torch can use a GPU here, and how much memory may be taken."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

CPU, CUDA = "cpu", "cuda"
BFLOAT16_FROM = (8, 0)
"""The compute capability from which products of bfloat16 are in hardware; below it torch only emulates them."""
MEMINFO = Path("/proc/meminfo")
CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Of version 2 and 1: what the container may take."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device.

    Args:
        kind: CPU or CUDA.
        total_bytes, free_bytes: its memory, and what of it may be taken now.
        capability: of a GPU by NVIDIA, (major, minor).
        count: devices of this kind; the engine uses the first.
    """

    kind: str
    name: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int] | None = None
    count: int = 1

    @property
    def bfloat16(self) -> bool:
        """Whether it multiplies bfloat16 itself. A CPU is slow at it, and right."""
        return self.capability is None or self.capability >= BFLOAT16_FROM

    def __str__(self) -> str:
        if self.kind == CPU:
            return f"cpu ({self.total_bytes:,} bytes)"
        of = "" if self.capability is None else ", compute capability {}.{}".format(*self.capability)
        return f"{self.name}{of} ({self.free_bytes:,} of {self.total_bytes:,} bytes free)"


def this_cpu(meminfo: Path = MEMINFO, limits: Sequence[Path] = CGROUPS) -> Hardware:
    """The machine's own memory, or as much of it as the container may have."""
    found = re.search(r"^MemTotal: +(\d+) kB", meminfo.read_text(), re.MULTILINE)
    sizes = [int(found[1]) << 10] if found else []
    sizes += [int(text) for text in map(_read, limits) if text.isdecimal()]
    least = min(sizes)
    return Hardware(CPU, "cpu", least, least)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def find_gpu() -> Hardware | str:
    """The first GPU, or why there is none that torch can use."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch warns of here it raises as well, or `built_for` knows it
        try:
            properties, arches = torch.cuda.get_device_properties(0), torch.cuda.get_arch_list()
            free_bytes, total_bytes = torch.cuda.mem_get_info(0)
        except (RuntimeError, AssertionError) as error:  # an id that CUDA and NVML count otherwise is an assertion
            return str(error).strip().partition("\n")[0].rstrip(".")
    capability = None if torch.version.hip else (properties.major, properties.minor)
    if capability is not None and not built_for(arches, capability):
        return (
            f"{properties.name} has compute capability {capability[0]}.{capability[1]}, and torch {torch.__version__} "
            f"is built for {', '.join(arches)}"
        )
    return Hardware(CUDA, properties.name, total_bytes, free_bytes, capability, torch.cuda.device_count())


def built_for(arches: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether code for `arches` (sm_90, compute_90, sm_90a, ...) runs on a GPU: machine code on any of its generation
    that is no older, intermediate code on any that is no older, code for one GPU on this alone (CUDA C++ Programming
    Guide, binary and PTX compatibility).
    """
    for arch in arches:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", arch)
        if found is None:
            continue
        kind, made, only = found[1], (int(found[2]), int(found[3])), found[4]
        if made == capability:
            return True
        if not only and made < capability and (kind == "compute" or made[0] == capability[0]):
            return True
    return False
