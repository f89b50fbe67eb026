"""How values get to and from a torch.device."""

from __future__ import annotations

import torch

from coserve_engine.device.cpu import CpuDevice
from coserve_engine.device.cuda import CudaDevice
from coserve_engine.device.protocol import Device


def device_of(device: torch.device) -> Device:
    """The `Device` of a torch.device."""
    return CudaDevice.of(device) if device.type == "cuda" else CpuDevice(device)
