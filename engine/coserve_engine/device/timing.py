"""How long a device takes."""

from __future__ import annotations

from collections.abc import Callable

from coserve_engine.device.protocol import Device

PATIENCE_S = 0.1


def seconds_of(device: Device, clock: Callable[[], float], run: Callable[[], object]) -> float:
    """Seconds of what `run` computes, by the device's own marks where it computes behind the host; waits for its
    end.
    """
    if not device.behind:
        began = clock()
        run()
        return clock() - began
    start = device.mark()
    run()
    end = device.mark()
    while not end.over():
        device.wait(end, PATIENCE_S)
    began = start.at_s()
    return end.at_s() - began
