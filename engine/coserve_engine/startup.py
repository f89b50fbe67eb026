"""What is decided before a model is loaded: device, dtype, how much at once, and what memory it will take."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from coserve_engine.config import DeviceChoice, EngineConfig
from coserve_engine.errors import EngineConfigError
from coserve_engine.formats.model_folder import check_length, read_model_config
from coserve_engine.hardware import CPU, CUDA, Hardware, find_gpu, this_cpu
from coserve_engine.memory import plan_memory

log = logging.getLogger(__name__)

AUTO = "auto"
COMPUTED = ("float32", "bfloat16")
"""What an endpoint may have; float64 is for tests."""
LARGE_GPU_BYTES = 70 << 30
"""Cards of 80 GB and more have it; those below, and slices of one, would give much of their memory to activations."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """How the engine runs on this machine, what computes, and lines for the log that say why."""

    config: EngineConfig
    device: str = ""
    notes: tuple[str, ...] = ()


def prepare(config: EngineConfig, choice: DeviceChoice) -> Chosen:
    """`config` with all that `choice` leaves open. It is logged at once, with the plan of the memory: loading may be
    what fails.

    Raises:
        EngineConfigError: this machine has not what is asked for.
        ModelFolderError: as `read_model_config` and `check_length`.
    """
    gpu = "engine.device is cpu" if choice.device == CPU else find_gpu()
    hardware, why = choose_device(choice, gpu, this_cpu())
    settled, notes = settle(config, choice, hardware)
    folder = Path(config.model_path)
    model = read_model_config(folder)
    check_length(folder, model, config.max_model_length)  # or too long a one would be told to raise its cache
    plan = plan_memory(model, settled, hardware, choice.kv_cache_bytes, choice.max_jobs)
    if hardware.kind == CUDA:
        notes += kept_kernels(choice)
    notes = (f"device {hardware}: {why}", *notes)
    for line in (*notes, *(f"memory: {line}" for line in plan.lines())):
        log.info("engine: %s", line)
    return Chosen(replace(settled, kv_cache_bytes=plan.kv_bytes), hardware.name, notes)


def choose_device(choice: DeviceChoice, gpu: Hardware | str, cpu: Hardware) -> tuple[Hardware, str]:
    """The device, and why it is this.

    Args:
        gpu: what torch sees, or why it sees none.

    Raises:
        EngineConfigError: a GPU is asked for, and there is none.
    """
    resource = choice.gpu_resource
    if choice.device == CPU:
        return cpu, "engine.device is cpu" + (f", though the pod's resources ask for {resource}" if resource else "")
    asked = "engine.device is cuda"
    if choice.device == AUTO:
        asked = f"the pod's resources ask for {resource}" if resource else ""
    if isinstance(gpu, Hardware):
        several = f"; {gpu.count} are visible, and an agent uses one" if gpu.count > 1 else ""
        return gpu, (asked or "torch sees it") + several
    none = f"torch can use no GPU here: {gpu}"
    if choice.visible_devices is not None:
        none += f" (CUDA_VISIBLE_DEVICES is {choice.visible_devices!r})"
    if asked:
        check = "check the node's driver and device plugin and what else uses the GPU"
        if not resource:
            check = "the pod asks for none: add one, such as nvidia.com/gpu: 1, to template.resources.limits"
        raise EngineConfigError(f"{asked}, and {none}; {check}, or set engine.device to cpu")
    return cpu, f"engine.device is auto, and {none}"


def settle(config: EngineConfig, choice: DeviceChoice, hardware: Hardware) -> tuple[EngineConfig, tuple[str, ...]]:
    """`config` for this device, but for its cache, and a line for the log for each thing that was open.

    Raises:
        EngineConfigError: the device or the engine has no such dtype.
    """
    dtype = _dtype(choice.dtype, hardware)
    requests, tokens, pass_tokens = _sizes(hardware)
    settled = replace(
        config,
        device="cuda:0" if hardware.kind == CUDA else CPU,
        dtype=dtype,
        max_requests=choice.max_requests or requests,
        max_batch_tokens=choice.max_batch_tokens or tokens,
        pass_tokens=pass_tokens,
    )
    at_once = f"{settled.places} requests and {settled.max_batch_tokens} tokens an iteration"
    return settled, (f"dtype {dtype}: engine.dtype is {choice.dtype}", at_once)


def kept_kernels(choice: DeviceChoice) -> tuple[str, ...]:
    """Where this process looks for compiled kernels, and keeps them: lines for the log. Nothing where there is no
    triton: `select` says so.
    """
    try:
        from coserve_engine.kernels.triton.cache import keep  # noqa: PLC0415  (for Linux alone)
    except ImportError:
        return ()
    folders = (None if name is None else Path(name) for name in (choice.kernel_cache, choice.image_kernels))
    return (keep(*folders),)


def _dtype(wanted: str, hardware: Hardware) -> str:
    dtype, said = wanted, f"engine.dtype is {wanted}"
    if wanted == AUTO:
        dtype = "bfloat16" if hardware.kind == CUDA else "float32"
        said += f", which is {dtype} here"
    if dtype == "bfloat16" and not hardware.bfloat16:
        raise EngineConfigError(f"{said}, and {hardware} has none; set engine.dtype to float32, or use a newer GPU")
    if dtype not in COMPUTED:
        raise EngineConfigError(f"{said}; set it to auto, {' or '.join(COMPUTED)}")
    return dtype


def _sizes(hardware: Hardware) -> tuple[int, int, int]:
    """Requests at once and tokens of an iteration: as many decode rows as fill the device, and a prompt beside them
    that uses it well. And tokens of a pass, in which short samples fill it: twice the 1,024 rows with which output
    tiles of a large card are whole waves, on others as many. What fills it is measured too (`regimes`), but that errs
    by a factor of two at times, and a job that goes on after a restart must find the passes that it had.
    """
    if hardware.kind == CPU:
        return 64, 512, 512
    return (256, 8192, 2048) if hardware.total_bytes >= LARGE_GPU_BYTES else (128, 2048, 1024)


OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""In what torch says where memory is lacking beside its allocator on a GPU (contexts, kernels, workspaces), and on a
CPU.
"""


def explained(error: Exception) -> str:
    """What is said of an error that ended the engine and is none of its own."""
    said = str(error).partition("\n")[0]
    lacking = isinstance(error, RuntimeError) and any(sign in said for sign in OUT_OF_MEMORY)
    if isinstance(error, MemoryError) or lacking:
        return (
            f"the device ran out of memory ({said}); the log has the plan: lower what is largest in it, or see what "
            "else runs on the device"
        )
    return f"the engine's own mistake: {error!r}; its log has the rest"
