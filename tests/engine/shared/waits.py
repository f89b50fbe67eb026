"""Where the engine would wait for a device, or copy from memory that is not pinned, found without one: on a CPU both
are recognised by their operators.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import coserve_engine

PACKAGE = Path(coserve_engine.__file__).parent
WAITS = {
    "_local_scalar_dense",
    "_unique2",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "nonzero_numpy",
    "unique_dim",
}
"""Operators whose result, or its shape, the host must read."""
EXEMPT = PACKAGE / "device"
"""The room through which values are to go."""


def place() -> str | None:
    """kernels/table.function of the innermost frame of ours; None outside the engine and in the room `device`."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(PACKAGE) and not frame.name.startswith("<"):  # a comprehension, to some Pythons
            if path.is_relative_to(EXEMPT):
                return None
            return f"{path.relative_to(PACKAGE).with_suffix('').as_posix()}.{frame.name}"
    return None


class Waits(TorchDispatchMode):
    """Counts by (kind, place): `wait`s of the host, and `copy`s of Python's numbers to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str]] = Counter()

    def _see(self, kind: str) -> None:
        at = place()
        if at is not None:
            self.found[kind, at] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS or (name == "repeat_interleave" and not isinstance(args[-1], int)):
            self._see("wait")
        elif name == "lift_fresh":
            self._see("copy")
        elif name in ("index", "index_put", "index_put_", "_unsafe_index") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            self._see("wait")
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Waits:
        read: Callable[[torch.Tensor], Any] = torch.Tensor.tolist

        def tolist(tensor: torch.Tensor) -> Any:
            self._see("wait")
            return read(tensor)

        self._patch = mock.patch.object(torch.Tensor, "tolist", tolist)  # it reads a CPU's memory without an operator
        self._patch.start()
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._patch.stop()
        super().__exit__(kind, value, trace)
