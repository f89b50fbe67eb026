"""A safetensors file that others may have written: of a bounded size and header before a library parses it."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from coserve_engine.formats.opened import opened

HEADER_BYTES = 16 << 20
"""A header has some 150 bytes a tensor."""
DTYPES = frozenset(
    (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
)
"""Those that torch can turn into another."""


def load_tensors(folder: Path, name: str, most_values: int) -> dict[str, torch.Tensor]:
    """The tensors of a file in `folder`, which has at most `most_values` numbers.

    Raises:
        OSError: as of `opened`.
        ValueError: it is too large, or not readable as safetensors.
    """
    with opened(folder, name) as file:
        size, header = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        if header > min(HEADER_BYTES, size - 8):
            raise ValueError(f"not readable as safetensors (a header of {header} bytes in a file of {size})")
        if size > HEADER_BYTES + 8 * most_values:
            raise ValueError(f"has {size} bytes, and at most {most_values} numbers have a place here")
        try:
            return load_file(f"/proc/self/fd/{file.fileno()}")  # the file that was looked at, whatever has its name now
        except SafetensorError as error:
            raise ValueError(f"not readable as safetensors ({error})") from None
