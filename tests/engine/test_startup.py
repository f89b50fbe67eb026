"""What is chosen before a model is loaded, and what is refused: each device is a plain value here, and the machine that
runs this has no GPU, so what torch says of one that is not there is real.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from coserve_engine import startup
from coserve_engine.config import DeviceChoice, EngineConfig
from coserve_engine.errors import EngineConfigError, ModelFolderError
from coserve_engine.formats.model_folder import read_model_config
from coserve_engine.hardware import CPU, CUDA, Hardware, built_for, find_gpu, this_cpu
from coserve_engine.kernels.triton import cache
from coserve_engine.memory import weight_values
from coserve_engine.startup import choose_device, explained, prepare, settle

HERE = Hardware(CPU, "cpu", 64 << 30, 64 << 30)
H200 = Hardware(CUDA, "NVIDIA H200", 150_110_011_392, 149_000_000_000, (9, 0))
T4 = Hardware(CUDA, "Tesla T4", 15_828_320_256, 15_700_000_000, (7, 5))
L4 = Hardware(CUDA, "NVIDIA L4", 23_580_000_000, 23_300_000_000, (8, 9))
MI300X = Hardware(CUDA, "AMD Instinct MI300X", 206_000_000_000, 205_000_000_000)
NONE = "Found no NVIDIA driver on your system"
GPU = "nvidia.com/gpu"
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


# ---- which device ----


@pytest.mark.parametrize(
    ("choice", "gpu", "chosen", "why"),
    [
        (DeviceChoice(), H200, H200, "torch sees it"),
        (DeviceChoice(), NONE, HERE, f"engine.device is auto, and torch can use no GPU here: {NONE}"),
        (DeviceChoice(gpu_resource=GPU), H200, H200, "the pod's resources ask for nvidia.com/gpu"),
        (DeviceChoice("cuda"), H200, H200, "engine.device is cuda"),
        (DeviceChoice("cuda", GPU), replace(H200, count=2), replace(H200, count=2), "2 are visible, and an agent uses"),
        (DeviceChoice("cpu"), H200, HERE, "engine.device is cpu"),
        (DeviceChoice("cpu", GPU), NONE, HERE, "engine.device is cpu, though the pod's resources ask for nvidia"),
    ],
)
def test_the_device_is_chosen_and_the_reason_said(
    choice: DeviceChoice, gpu: Hardware | str, chosen: Hardware, why: str
) -> None:
    device, said = choose_device(choice, gpu, HERE)
    assert device == chosen
    assert why in said


@pytest.mark.parametrize(
    ("choice", "asked"),
    [
        (DeviceChoice("cuda"), "engine.device is cuda"),
        (DeviceChoice("cuda", GPU), "engine.device is cuda"),
        (DeviceChoice(gpu_resource="nvidia.com/mig-1g.18gb"), "the pod's resources ask for nvidia.com/mig-1g.18gb"),
    ],
)
def test_a_gpu_that_is_asked_for_and_is_not_there(choice: DeviceChoice, asked: str) -> None:
    """Never a CPU in its place: it would be a hundred times as slow, and nobody would know."""
    with pytest.raises(EngineConfigError) as caught:
        choose_device(choice, NONE, HERE)
    message = str(caught.value)
    assert message.startswith(asked)
    assert NONE in message
    assert ("check the node's driver" in message) == bool(choice.gpu_resource)
    assert ("template.resources.limits" in message) != bool(choice.gpu_resource)
    assert "set engine.device to cpu" in message


def test_what_hides_a_gpu_is_said() -> None:
    """By torch it is "No CUDA GPUs are available", whatever the reason."""
    for hidden in ("", "MIG-0b1c5a3e", "7"):
        with pytest.raises(EngineConfigError, match=rf"{NONE} \(CUDA_VISIBLE_DEVICES is '{hidden}'\); check"):
            choose_device(DeviceChoice("cuda", GPU, visible_devices=hidden), NONE, HERE)
        assert (
            f"CUDA_VISIBLE_DEVICES is '{hidden}'" in choose_device(DeviceChoice(visible_devices=hidden), NONE, HERE)[1]
        )


def test_a_gpu_that_torch_counts_and_does_not_find_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where NVML and CUDA count the slices of a GPU otherwise."""

    def refused(_: int) -> None:
        raise AssertionError("Invalid device id")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", refused)
    assert find_gpu() == "Invalid device id"


@without_gpu
def test_torch_says_why_there_is_none() -> None:
    found = find_gpu()
    assert isinstance(found, str)
    assert ("NVIDIA" in found) or ("built without CUDA" in found)


@without_gpu
def test_an_engine_for_a_gpu_does_not_start_without_one(plain: str) -> None:
    for choice in (DeviceChoice("cuda"), DeviceChoice(gpu_resource=GPU)):
        with pytest.raises(EngineConfigError, match="torch can use no GPU here: "):
            prepare(EngineConfig(plain, max_model_length=256), choice)


@pytest.mark.parametrize(
    ("arches", "capability", "runs"),
    [
        (("sm_75", "sm_80", "sm_90", "sm_100", "sm_120"), (9, 0), True),
        (("sm_75", "sm_80", "sm_90", "sm_100", "sm_120"), (8, 9), True),
        (("sm_75", "sm_80", "sm_90", "sm_100", "sm_120"), (12, 1), True),
        (("sm_75", "sm_80", "sm_90", "sm_100", "sm_120"), (7, 0), False),
        (("sm_75", "sm_80", "sm_90", "sm_100", "sm_120"), (6, 1), False),
        (("sm_80", "sm_86"), (9, 0), False),
        (("sm_80", "compute_86"), (9, 0), True),
        (("sm_86",), (8, 0), False),
        (("sm_90a",), (9, 0), True),
        (("sm_100a", "compute_100a"), (10, 3), False),
        ((), (9, 0), False),
    ],
)
def test_code_for_a_gpu_runs_on_those_of_its_generation(
    arches: tuple[str, ...], capability: tuple[int, int], runs: bool
) -> None:
    assert built_for(arches, capability) is runs


# ---- which dtype ----


@pytest.mark.parametrize(
    ("wanted", "hardware", "dtype"),
    [
        ("auto", HERE, "float32"),
        ("float32", HERE, "float32"),
        ("auto", H200, "bfloat16"),
        ("bfloat16", H200, "bfloat16"),
        ("bfloat16", MI300X, "bfloat16"),
        ("bfloat16", HERE, "bfloat16"),
        ("float32", H200, "float32"),
        ("float32", T4, "float32"),
    ],
)
def test_the_dtype_follows_the_device_where_it_is_open(wanted: str, hardware: Hardware, dtype: str) -> None:
    settled, notes = settle(EngineConfig(""), DeviceChoice(dtype=wanted), hardware)
    assert settled.dtype == dtype
    assert f"dtype {dtype}: engine.dtype is {wanted}" in notes


@pytest.mark.parametrize("wanted", ("auto", "bfloat16"))
def test_a_gpu_without_bfloat16_is_refused(wanted: str) -> None:
    """Torch would emulate it, and say nothing."""
    with pytest.raises(EngineConfigError) as caught:
        settle(EngineConfig(""), DeviceChoice(dtype=wanted), T4)
    message = str(caught.value)
    assert f"engine.dtype is {wanted}" in message
    assert "Tesla T4, compute capability 7.5" in message
    assert "set engine.dtype to float32" in message


@pytest.mark.parametrize("wanted", ("float16", "float64", ""))
def test_a_dtype_that_is_none_is_refused(wanted: str) -> None:
    with pytest.raises(EngineConfigError, match=f"engine.dtype is {wanted}; set it to auto, float32 or bfloat16"):
        settle(EngineConfig(""), DeviceChoice(dtype=wanted), H200)


# ---- how much at once ----


@pytest.mark.parametrize(
    ("hardware", "sizes"),
    [(HERE, (64, 512, 512)), (H200, (256, 8192, 2048)), (MI300X, (256, 8192, 2048)), (L4, (128, 2048, 1024))],
)
def test_requests_and_batch_tokens_follow_the_device_where_they_are_open(
    hardware: Hardware, sizes: tuple[int, int, int]
) -> None:
    settled, notes = settle(EngineConfig(""), DeviceChoice(dtype="float32"), hardware)
    assert (settled.max_requests, settled.max_batch_tokens, settled.pass_tokens) == sizes
    assert f"{sizes[0]} requests and {sizes[1]} tokens an iteration" in notes
    fixed, _ = settle(EngineConfig(""), DeviceChoice("auto", "", "float32", 7, 300), hardware)
    assert (fixed.max_requests, fixed.max_batch_tokens) == (7, 300)


def test_a_cpu_keeps_the_defaults_of_an_engine() -> None:
    """All but where it lies: what an endpoint without these fields was on a CPU it stays."""
    config = EngineConfig("", max_model_length=256)
    settled, _ = settle(config, DeviceChoice(), HERE)
    assert settled == config


# ---- memory ----


def test_a_container_has_the_memory_of_its_limit(tmp_path: Path) -> None:
    meminfo, limit, none = tmp_path / "meminfo", tmp_path / "memory.max", tmp_path / "none"
    meminfo.write_text("MemTotal:       16384 kB\nMemFree:          100 kB\n")
    assert this_cpu(meminfo, (none,)).free_bytes == 16 << 20
    for text, least in (("max\n", 16 << 20), ("1048576\n", 1 << 20), (f"{1 << 62}\n", 16 << 20)):
        limit.write_text(text)
        assert this_cpu(meminfo, (limit, none)).free_bytes == least


def test_a_start_says_its_plan_before_anything_is_read(
    plain: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.json").write_bytes((Path(plain) / "config.json").read_bytes())
    with caplog.at_level(logging.INFO, "coserve_engine"):
        chosen = prepare(EngineConfig(str(tmp_path), max_model_length=256), DeviceChoice("cpu"))
    assert (chosen.config, chosen.device) == (EngineConfig(str(tmp_path), max_model_length=256), "cpu")
    assert chosen.notes[0].startswith("device cpu (")
    assert chosen.notes[0].endswith("engine.device is cpu")
    assert f"memory: weights: {4 * weight_values(read_model_config(tmp_path)):,} bytes" in caplog.text
    assert f"memory: KV cache (8192 pages): {256 << 20:,} bytes" in caplog.text


def test_a_gpus_kernels_are_kept_where_the_agent_says(plain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Path | None, ...]] = []
    monkeypatch.setattr(cache, "keep", lambda *folders: seen.append(folders) or "kept")
    monkeypatch.setattr(startup, "find_gpu", lambda: H200)
    config, folders = EngineConfig(plain, max_model_length=256), {"kernel_cache": "/cache", "image_kernels": "/image"}
    assert "kept" in prepare(config, DeviceChoice("cuda", **folders)).notes
    assert "kept" not in prepare(config, DeviceChoice("cpu", **folders)).notes
    assert "kept" in prepare(config, DeviceChoice("cuda")).notes
    assert seen == [(Path("/cache"), Path("/image")), (None, None)]
    monkeypatch.setitem(sys.modules, "coserve_engine.kernels.triton.cache", None)
    assert "kept" not in prepare(config, DeviceChoice("cuda")).notes, "without triton `select` says what to do"


def test_a_folder_that_is_not_there_is_named_before_memory_is(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"config\.json"):
        prepare(EngineConfig(str(tmp_path)), DeviceChoice("cpu"))


def test_a_length_beyond_the_models_is_said_before_its_cache_is(plain: str) -> None:
    with pytest.raises(ModelFolderError, match=r"maxModelLength is 1000000, but .* max_position_embeddings 512; lower"):
        prepare(EngineConfig(plain, max_model_length=1_000_000), DeviceChoice("cpu"))


def test_running_out_of_memory_is_no_riddle() -> None:
    said = explained(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."))
    assert said.startswith("the device ran out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.)")
    assert "the log has the plan" in said
    assert "own mistake: KeyError('x')" in explained(KeyError("x"))


def real_refusal() -> Exception:
    """What torch says on a CPU of more than there can be."""
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(1 << 60, dtype=torch.uint8)
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        real_refusal(),
        MemoryError("no"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=("torch on a CPU", "Python", "CUDA", "cuBLAS"),
)
def test_memory_that_lacks_beside_torchs_allocator_is_no_riddle(error: Exception) -> None:
    assert explained(error).startswith(f"the device ran out of memory ({str(error).splitlines()[0]})")


def test_shards_are_read_in_order_with_their_sizes(
    model_path: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, rig: Any
) -> None:
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    AutoModelForCausalLM.from_pretrained(model_path("plain")).save_pretrained(tmp_path, max_shard_size="200KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    with caplog.at_level(logging.INFO, "coserve_engine"):
        sharded = rig(str(tmp_path)).executor
    said = [line for line in caplog.messages if line.startswith("reading ")]
    assert said == [
        f"reading {path.name} ({n} of {len(shards)}, {path.stat().st_size:,} bytes)" for n, path in enumerate(shards, 1)
    ]
    whole = rig(model_path("plain")).executor
    assert torch.equal(sharded.transformer.weights.embed, whole.transformer.weights.embed)
