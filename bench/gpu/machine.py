"""The device that figures are of: its name, its two rates, and when its work is over."""

from __future__ import annotations

import importlib
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Rates:
    """What a roofline is made of: operations a second of bfloat16 products, bytes a second that are read."""

    flops_per_s: float
    bytes_per_s: float


def name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    return f"rehearsal on a CPU ({platform.machine()}), torch {torch.__version__}"


def triton(device: torch.device) -> str:
    """Which there is, or why none can be used here. Torch is kept from one that does not load: it would go on without
    one, and takes only some errors for that.
    """
    try:
        found = importlib.import_module("triton")
        if device.type == "cuda":
            found.runtime.driver.active.get_current_target()  # builds its launcher, where a compiler may be missing
    except Exception as error:  # a broken one may raise anything, and some steps run without it
        sys.modules["triton"] = None  # to import it is then an ImportError
        reason = str(error).strip().partition("\n")[0]
        return f"{'missing' if isinstance(error, ModuleNotFoundError) else 'broken'} ({type(error).__name__}: {reason})"
    return str(found.__version__)


def wait(device: torch.device) -> None:
    """Until all that was launched is over."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rates(device: torch.device, width: int, values: int, seconds: float) -> Rates:
    """Over `seconds` each, not a burst: a square product of this width, and a copy of so many values."""
    a = torch.randn(width, width, dtype=torch.bfloat16, device=device)
    b, out = torch.randn_like(a), torch.empty_like(a)
    source = torch.zeros(values, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    products = _repeated(lambda: torch.mm(a, b, out=out), device, seconds)
    copies = _repeated(lambda: target.copy_(source), device, seconds)
    return Rates(2 * width**3 * products, 2 * source.nbytes * copies)


def _repeated(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Calls a second."""
    call()
    wait(device)
    started, count, passed = time.perf_counter(), 0, 0.0
    while passed < seconds:
        for _ in range(20):
            call()
        wait(device)
        count, passed = count + 20, time.perf_counter() - started
    return count / passed
