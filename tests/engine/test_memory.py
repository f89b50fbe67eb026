"""The plan of a device's memory: its parts are what the engine makes, it fits or is refused in bytes, part by part."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coserve_engine.config import EngineConfig, ModelConfig, Rope
from coserve_engine.errors import EngineConfigError
from coserve_engine.formats.model_folder import read_model_config
from coserve_engine.hardware import CPU, CUDA, Hardware
from coserve_engine.kernels.cpu.linears import PackedLinear
from coserve_engine.memory import (
    MOST_PAGES,
    graphs_bytes,
    lora_values,
    packed_values,
    page_bytes,
    pass_bytes,
    plan_memory,
    sequence_bytes,
    weight_values,
)
from coserve_engine.messages import Pass, TrainSeq
from coserve_engine.training.jobs import Job


def gpu(free_bytes: int) -> Hardware:
    return Hardware(CUDA, "GPU", free_bytes + 1000, free_bytes)


def cpu(free_bytes: int) -> Hardware:
    return Hardware(CPU, "cpu", free_bytes, free_bytes)


H200 = gpu(140_000_000_000)
MODELS = ("plain", "tied", "wide", "llama31", "mistral", "qwen2", "qwen3")


def shape(
    *, vocab: int, hidden: int, layers: int, heads: tuple[int, int, int], intermediate: int, **fields: Any
) -> ModelConfig:
    """`heads`: of queries, of keys, and their size."""
    rest = {"biased": (), "qk_norm": False, "tied": True, **fields}
    return ModelConfig(
        vocab, hidden, layers, *heads, intermediate, 1e-5, Rope(1e4), 131072, windows=(None,) * layers,
        eos_token_ids=(), **rest,
    )  # fmt: skip


LLAMA_8B = shape(vocab=128256, hidden=4096, layers=32, heads=(32, 8, 128), intermediate=14336, tied=False)


@pytest.mark.parametrize(
    ("model", "values"),
    [
        (LLAMA_8B, 8_030_261_248),
        (
            shape(
                vocab=151936, hidden=896, layers=24, heads=(14, 2, 64), intermediate=4864,
                biased=("q_proj", "k_proj", "v_proj"),
            ),
            494_032_768,
        ),
        (
            shape(vocab=151936, hidden=1024, layers=28, heads=(16, 8, 128), intermediate=3072, qk_norm=True),
            596_049_920,
        ),
    ],
    ids=("Llama-3.1-8B", "Qwen2.5-0.5B", "Qwen3-0.6B"),
)  # fmt: skip
def test_weights_are_as_many_as_published(model: ModelConfig, values: int) -> None:
    assert weight_values(model) == values


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("name", MODELS)
def test_parts_are_what_the_engine_makes(
    rig: Any, model_path: Any, random_adapter: Any, draw_tokens: Any, name: str, dtype: str
) -> None:
    path = model_path(name)
    r = rig(path, max_rank=20, dtype=dtype)
    e, model = r.executor, r.executor.model
    with (Path(path) / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    tensors = [entry["shape"] for key, entry in header.items() if key != "__metadata__"]
    assert weight_values(model) == sum(map(math.prod, tensors))
    assert page_bytes(model, e.config) == (e.cache.k.nbytes + e.cache.v.nbytes) // (e.ledger.total + 1)
    weights = e.transformer.weights
    linears = (weights.head, *(linear for layer in weights.layers for linear in layer.linears.values()))
    packed = [linear for linear in linears if isinstance(linear, PackedLinear)]
    if dtype == "float32" and len(packed) == len(linears):
        laid_out = sum(w.numel() for linear in packed for w in (linear._forward, linear._backward))
        assert weight_values(model) + packed_values(model, e.config) == laid_out + weights.embed.numel() + sum(
            math.prod(entry["shape"]) for key, entry in header.items() if key.endswith(("norm.weight", "bias"))
        )
    adapter = random_adapter(e, rank=20)
    assert lora_values(model, 20) == adapter.layout.size
    state = r.run_pass(Pass(1, "job", 0, 0, (TrainSeq(0, draw_tokens(1, 96), (0.01,) * 96),)), adapter)
    made = [state.final, state.dx, state.dkv, state.grads, *(t for layer in state.kept for t in layer.values())]
    assert pass_bytes(model, e.config, 96) == sum(tensor.nbytes for tensor in made)


def test_the_smallest_pool_is_the_one_that_the_engine_starts_with(plain: str, rig: Any) -> None:
    config = EngineConfig(plain, max_model_length=200)
    smallest = sequence_bytes(read_model_config(Path(plain)), config)
    rig(max_model_length=200, kv_cache_bytes=smallest)
    with pytest.raises(Exception, match="kvCacheMemory"):
        rig(max_model_length=200, kv_cache_bytes=smallest - 1)


def test_what_is_left_is_the_caches() -> None:
    config = EngineConfig("", dtype="bfloat16", max_model_length=8192, max_batch_tokens=8192, max_requests=256)
    plan = plan_memory(LLAMA_8B, config, H200, None)
    parts = {part.name: part.bytes for part in plan.parts}
    assert parts["weights"] == 16_060_522_496
    assert parts["2 passes"] == pytest.approx(2 * 2 * 11.8e9, rel=0.2), "as gpu-targets reckons at 4k, and twice"
    assert plan.kv_bytes == plan.pages * page_bytes(LLAMA_8B, config)
    assert 0 <= H200.free_bytes - sum(parts.values()) - plan.kv_bytes < page_bytes(LLAMA_8B, config)
    without = plan_memory(LLAMA_8B, replace(config, finetuning=False), H200, None)
    assert without.kv_bytes > plan.kv_bytes
    assert plan_memory(LLAMA_8B, config, H200, 10**10).kv_bytes == 10**10
    short = [replace(config, max_model_length=512, pass_tokens=tokens) for tokens in (512, 2048)]
    passes = [next(p.bytes for p in plan_memory(LLAMA_8B, c, H200, None).parts if p.name == "2 passes") for c in short]
    assert passes[1] > 3 * passes[0], "short samples share a pass"
    printed = "\n".join(plan.lines())
    assert all(f"{part.name}: {part.bytes:,} bytes" in printed for part in plan.parts)


def test_graphs_take_what_their_largest_has_alive_and_what_each_keeps() -> None:
    """768 rows at once, whatever more a batch may have, and 256 where it has fewer than 320."""
    config = EngineConfig("", dtype="bfloat16", max_model_length=8192, max_batch_tokens=8192, max_requests=256)
    both, more = (graphs_bytes(LLAMA_8B, replace(config, max_batch_tokens=n)) for n in (8192, 16384))
    assert both == more
    fewer = graphs_bytes(LLAMA_8B, replace(config, max_batch_tokens=319))
    row = 3 * (2 + 4) * (4096 + 40 * 128 + 14336)
    assert both - fewer > 512 * row
    assert both < 2 << 30


def test_a_tiny_model_has_no_millions_of_pages() -> None:
    tiny = shape(vocab=128, hidden=64, layers=2, heads=(4, 2, 16), intermediate=160)
    assert plan_memory(tiny, EngineConfig("", dtype="bfloat16"), H200, None).pages == MOST_PAGES


def numbers(text: str) -> list[int]:
    return [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\d|\d", text)]


@pytest.mark.parametrize("finetuning", (True, False))
@pytest.mark.parametrize("kv_bytes", (None, 8 << 30))
def test_too_little_is_said_in_bytes_part_by_part(finetuning: bool, kv_bytes: int | None) -> None:
    """24 GB hold the model and a sequence, and not what is asked for beside them; 8 GB not even the model."""
    config = EngineConfig("", dtype="bfloat16", max_model_length=8192, max_batch_tokens=2048, finetuning=finetuning)
    for free in (24 << 30, 8 << 30):
        if free == 24 << 30 and not finetuning and kv_bytes is None:
            assert plan_memory(LLAMA_8B, config, gpu(free), kv_bytes).pages > 128
            continue
        with pytest.raises(EngineConfigError) as caught:
            plan_memory(LLAMA_8B, config, gpu(free), kv_bytes)
        message = str(caught.value)
        assert "weights 16,060,522,496" in message
        if free == 24 << 30:
            assert "activationMemory" in message or not finetuning
            assert ("engine.kvCacheMemory" in message) == (kv_bytes is not None)
        found, total, lacking, *_ = numbers(message)
        parts = numbers(re.sub(r"\b\d+ (jobs|passes) ", "", re.split("too few for: |;", message)[1]))
        assert (found, total, sum(parts) - lacking) == (free, free + 1000, free)


def test_a_cpu_refuses_only_what_is_sure_not_to_fit() -> None:
    """Memory is taken there as it is written: passes of full length may never come, each page of the pool does."""
    config = EngineConfig("", max_model_length=8192)
    weights = 4 * weight_values(LLAMA_8B)
    enough = weights + (8 << 30)
    plan = plan_memory(LLAMA_8B, config, cpu(enough), 8 << 30)
    assert plan.lines()[-1].startswith("lacking, should all of it be in use at once: ")
    with pytest.raises(EngineConfigError, match=f"has 1 bytes too few for: weights {weights:,}") as caught:
        plan_memory(LLAMA_8B, config, cpu(enough - 1), 8 << 30)
    assert str(caught.value).endswith("or lower engine.kvCacheMemory")


@pytest.mark.parametrize("kind", (gpu, cpu))
@pytest.mark.parametrize(
    ("dtype", "free", "helps"), [("float32", 26, True), ("float32", 8, False), ("bfloat16", 8, False)]
)
def test_only_what_helps_is_a_remedy(kind: Callable[[int], Hardware], dtype: str, free: int, helps: bool) -> None:
    """Where the weights alone are too many, nothing but fewer bytes a weight does, if that is enough."""
    config = EngineConfig("", max_model_length=256, dtype=dtype)
    with pytest.raises(EngineConfigError, match="too few for: weights") as caught:
        plan_memory(LLAMA_8B, config, kind(free << 30), None)
    assert ("set engine.dtype to bfloat16" in str(caught.value)) == helps
    assert "lower" not in str(caught.value)


def test_the_length_that_a_cache_is_enough_for_is_enough() -> None:
    config = EngineConfig("", max_model_length=131_072, dtype="bfloat16")
    with pytest.raises(EngineConfigError, match=r"not set, which on a CPU is 268,435,456 bytes, .* lower") as caught:
        plan_memory(LLAMA_8B, config, cpu(10**12), None)
    shorter = int(str(caught.value).rpartition(" ")[2])
    assert shorter == 1984
    plan_memory(LLAMA_8B, replace(config, max_model_length=shorter), cpu(10**12), None)
    with pytest.raises(EngineConfigError, match=r"lower maxModelLength to 1984"):
        plan_memory(LLAMA_8B, replace(config, max_model_length=shorter + 1), cpu(10**12), None)
    with pytest.raises(EngineConfigError, match=r"raise kvCacheMemory or lower maxModelLength$"):
        plan_memory(LLAMA_8B, config, cpu(10**12), page_bytes(LLAMA_8B, config))


@pytest.mark.parametrize("hardware", (gpu(10**12), cpu(10**12)))
def test_a_cache_below_one_sequence_is_refused(hardware: Hardware) -> None:
    config = EngineConfig("", max_model_length=8192)
    least = sequence_bytes(LLAMA_8B, config)
    with pytest.raises(EngineConfigError, match=rf"kvCacheMemory is {least - 1:,} .* takes {least:,}; raise"):
        plan_memory(LLAMA_8B, config, hardware, least - 1)


@given(
    free=st.integers(0, 200 << 30),
    kv=st.none() | st.integers(1 << 30, 100 << 30),
    length=st.integers(16, 131072),
    rows=st.integers(128, 65536),
    requests=st.integers(1, 4096),
    rank=st.integers(1, 256),
    jobs=st.integers(1, 16),
    kept=st.none() | st.integers(1 << 20, 100 << 30),
    finetuning=st.booleans(),
)
def test_a_plan_never_promises_more_than_there_is(
    free: int, kv: int | None, length: int, rows: int, requests: int, rank: int, jobs: int, kept: int | None,
    finetuning: bool,
) -> None:  # fmt: skip
    config = EngineConfig(
        "", length, rows, requests, dtype="bfloat16", max_rank=rank, pass_bytes=kept, finetuning=finetuning
    )
    try:
        plan = plan_memory(LLAMA_8B, config, gpu(free), kv, jobs)
    except EngineConfigError:
        return
    assert sum(part.bytes for part in plan.parts) + plan.kv_bytes <= free
    assert plan.kv_bytes >= sequence_bytes(LLAMA_8B, config)
    assert all(part.bytes >= 0 for part in plan.parts)


def test_a_job_holds_what_the_plan_says(driver: Any, start_job: Any) -> None:
    """Weights, their turned copy, gradient and two moments; a checkpoint's copies and the best weights come later."""
    d = driver()
    d.submit(start_job(rank=8))
    d.run()
    (job,) = d.engine.jobs.values()
    assert isinstance(job, Job)
    state, size = job._state, lora_values(d.engine.executor.model, 8)
    turned = [t for layer in job.weights.layers for pair in layer.values() for t in (pair.down, pair.up)]
    held = [state.param, job._grad, state.adam.m, state.adam.v, *turned]
    assert sum(tensor.numel() for tensor in held) == 5 * size
