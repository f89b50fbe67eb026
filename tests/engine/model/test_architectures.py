"""Every supported architecture is transformers' in logits and tokens and PEFT's in gradients, whatever is drawn for
its configuration; each method left out or off by one must show.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from coserve_engine.kernels import functional, plain
from coserve_engine.kernels.attention import Mask
from coserve_engine.kernels.plain import PlainLinear
from coserve_engine.messages import AddRequest, Pass, SamplingParams, TrainSeq
from coserve_engine.model import executor
from coserve_engine.model.probe import probe_row_invariance
from coserve_engine.numerics import Numerics

LENGTH = 100
GREEDY = SamplingParams(32, ignore_eos=True)
FEW = settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
KINDS = ("llama", "mistral", "qwen2", "qwen3")


@st.composite
def ropes(draw: st.DrawFn) -> dict[str, Any]:
    """rope_parameters of any supported kind, stretched from a context shorter than LENGTH."""
    theta = draw(st.sampled_from((1e2, 1e4, 1e6)))
    original = draw(st.integers(8, LENGTH - 1))
    factor = draw(st.floats(1.0, 16.0))
    kinds: tuple[dict[str, Any], ...] = (
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": factor},
        {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": draw(st.floats(0.5, 2.0)),
            "high_freq_factor": draw(st.floats(2.5, 8.0)),
            "original_max_position_embeddings": original,
        },
        {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "truncate": draw(st.booleans()),
            **draw(st.sampled_from(({}, {"attention_factor": 0.7}, {"beta_fast": 4.0, "beta_slow": 0.5}))),
        },
    )
    return {"rope_theta": theta, **draw(st.sampled_from(kinds))}


@st.composite
def models(draw: st.DrawFn, kind: str) -> dict[str, Any]:
    """Fields of a small config.json of one architecture."""
    kv_heads, size = draw(st.integers(1, 3)), draw(st.sampled_from((4, 8, 10, 16)))
    heads, layers = kv_heads * draw(st.integers(1, 4)), draw(st.integers(1, 3))
    fields: dict[str, Any] = {
        "model_type": kind,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": heads * draw(st.sampled_from((4, 8))),
        "head_dim": size,
        "intermediate_size": draw(st.integers(1, 12)) * 8,
        "tie_word_embeddings": draw(st.booleans()),
        "initializer_range": 0.2,
        "rms_norm_eps": draw(st.sampled_from((1e-6, 1e-5, 1e-2))),
        "rope_parameters": draw(ropes()),
    }
    window = draw(st.none() | st.integers(1, LENGTH - 1))
    if kind == "mistral":
        fields["sliding_window"] = window
    elif kind.startswith("qwen"):
        fields |= {"use_sliding_window": window is not None, "sliding_window": window}
        if draw(st.booleans()):
            names = ("full_attention", "sliding_attention") if window is not None else ("full_attention",)
            fields["layer_types"] = [draw(st.sampled_from(names)) for _ in range(layers)]
        else:
            fields["max_window_layers"] = draw(st.integers(0, layers))
    if kind in ("llama", "qwen3"):
        fields["attention_bias"] = draw(st.booleans())
    if kind == "llama":
        fields["mlp_bias"] = draw(st.booleans())
    return fields


@pytest.fixture
def folders(tmp_path: Path, save_model: Callable[..., None]) -> Callable[[dict[str, Any]], str]:
    """A folder for each drawn configuration."""
    made: list[Path] = []

    def make(fields: dict[str, Any]) -> str:
        made.append(tmp_path / str(len(made)))
        save_model(made[-1], len(made), **fields)
        return str(made[-1])

    return make


def logits_error(r: Any, tokens: tuple[int, ...]) -> float:
    """Largest difference from transformers, over a chunk and the rest one by one."""
    hf = AutoModelForCausalLM.from_pretrained(r.executor.config.model_path, dtype=torch.float64)
    with torch.no_grad():
        expected = hf(torch.tensor([tokens])).logits[0]
    found = r.rows(r.add(tokens), [60] + [1] * (len(tokens) - 60))
    return max(float((row - expected[at]).abs().max()) for at, row in found.items())


@FEW
@given(data=st.data(), tile=st.sampled_from((1, 7, 16, 64)))
@pytest.mark.usefixtures("float64_norms")
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_transformers(
    rig: Any, draw_tokens: Any, folders: Any, kind: str, data: st.DataObject, tile: int
) -> None:
    r = rig(folders(data.draw(models(kind))), dtype="float64", numerics=Numerics(tile=tile))
    assert logits_error(r, draw_tokens(3, LENGTH)) < 1e-9


@FEW
@given(data=st.data(), lengths=st.lists(st.integers(1, LENGTH), min_size=1, max_size=3))
@pytest.mark.usefixtures("float64_norms")
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_transformers(
    driver: Any, draw_tokens: Any, folders: Any, kind: str, data: st.DataObject, lengths: list[int]
) -> None:
    d = driver(folders(data.draw(models(kind))), dtype="float64")
    prompts = {f"r{n}": draw_tokens(n, length) for n, length in enumerate(lengths)}
    d.submit(*(AddRequest(name, prompt, GREEDY, 0.0) for name, prompt in prompts.items()))
    found = d.run().tokens()
    hf = AutoModelForCausalLM.from_pretrained(d.engine.config.model_path, dtype=torch.float64)
    for name, prompt in prompts.items():
        with torch.no_grad():
            expected = hf(torch.tensor([[*prompt, *found[name]]])).logits[0].argmax(-1).tolist()
        assert len(found[name]) == GREEDY.max_tokens
        assert found[name] == expected[len(prompt) - 1 : -1]


def gradient_error(r: Any, draw_tokens: Any, random_adapter: Any, reference: Any) -> float:
    """Largest difference from PEFT, as a share of the largest gradient, over a long sequence and a short one."""
    seqs = tuple(TrainSeq(n, draw_tokens(n, length), (0.01,) * length) for n, length in enumerate((LENGTH, 9)))
    adapter = random_adapter(r.executor, rank=3)
    state = r.run_pass(Pass(1, "job", 0, 0, seqs), adapter)
    _, expected = reference(r.executor, adapter).gradients(seqs)
    return float((state.grads - expected).abs().max() / expected.abs().max())


@FEW
@given(data=st.data(), tile=st.sampled_from((1, 7, 64)))
@pytest.mark.usefixtures("float64_norms")
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_pefts(
    rig: Any,
    draw_tokens: Any,
    random_adapter: Any,
    reference: Any,
    folders: Any,
    kind: str,
    data: st.DataObject,
    tile: int,
) -> None:
    r = rig(folders(data.draw(models(kind))), dtype="float64", numerics=Numerics(tile=tile))
    assert gradient_error(r, draw_tokens, random_adapter, reference) < 1e-10


@FEW
@given(data=st.data(), seed=st.integers(0, 1 << 16))
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_leave_no_trace(
    rig: Any, draw_tokens: Any, random_adapter: Any, folders: Any, kind: str, data: st.DataObject, seed: int
) -> None:
    """In float32, bit for bit; where widths leave scalar tails, the probe at start-up says that it cannot be."""
    r, source, tokens = rig(folders(data.draw(models(kind)))), random.Random(seed), draw_tokens(3, LENGTH)
    adapter = random_adapter(r.executor, rank=6)
    sizes: list[int] = []
    while (left := LENGTH - sum(sizes)) > 0:
        sizes.append(min(left, source.choice((1, source.randint(1, 70)))))
    alone = r.rows(r.add(tokens, adapter), [1] * LENGTH)
    chunks = r.rows(r.add(tokens, adapter), sizes)
    if not all(torch.equal(row, alone[at]) for at, row in chunks.items()):
        config = r.executor.model
        assert any(width % 8 for width in (config.hidden, config.intermediate, config.head_size))
        assert probe_row_invariance(r.executor.transformer, backward=False)


# ---- the same checks fail when a method is broken ----


def float64_rig(rig: Any, path: str) -> Any:
    return rig(path, dtype="float64")


@pytest.mark.usefixtures("float64_norms")
@pytest.mark.parametrize("by", (-1, 1))
@pytest.mark.parametrize("model", ("mistral", "qwen2"))
def test_a_window_off_by_one_shows(
    rig: Any, model_path: Any, draw_tokens: Any, monkeypatch: pytest.MonkeyPatch, model: str, by: int
) -> None:
    create = Mask.create

    def off(numerics: Numerics, group: int, length: int, window: int | None, *where: Any) -> Mask:
        return create(numerics, group, length, None if window is None else window + by, *where)

    monkeypatch.setattr(Mask, "create", off)
    assert logits_error(float64_rig(rig, model_path(model)), draw_tokens(3, LENGTH)) > 1e-6


@pytest.mark.usefixtures("float64_norms")
def test_a_window_in_every_layer_shows(rig: Any, model_path: Any, draw_tokens: Any) -> None:
    """qwen2 has one in its second layer only."""
    r = float64_rig(rig, model_path("qwen2"))
    kernels = r.executor.kernels
    second = replace(kernels, masks=kernels.masks[1:] * 2)
    r.executor.transformer = replace(r.executor.transformer, kernels=second)
    assert logits_error(r, draw_tokens(3, LENGTH)) > 1e-6


@pytest.mark.usefixtures("float64_norms")
@pytest.mark.parametrize("model", ("llama31", "qwen3"))
def test_unscaled_rotary_embedding_shows(
    rig: Any, model_path: Any, draw_tokens: Any, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    table = executor.rope_table
    monkeypatch.setattr(executor, "rope_table", lambda rope, *rest: table(replace(rope, scaling=None), *rest))
    assert logits_error(float64_rig(rig, model_path(model)), draw_tokens(3, LENGTH)) > 1e-6


@pytest.mark.usefixtures("float64_norms")
@pytest.mark.parametrize("name", ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
def test_a_bias_left_out_shows(rig: Any, model_path: Any, draw_tokens: Any, name: str) -> None:
    """But for that of the keys, which moves all scores of a row alike: only the rotation makes it show."""
    r = float64_rig(rig, model_path("llama31"))
    weights = r.executor.transformer.weights
    layers = tuple(
        replace(layer, linears={**layer.linears, name: PlainLinear(layer.linears[name].weight)})
        for layer in weights.layers
    )
    r.executor.transformer = replace(r.executor.transformer, weights=replace(weights, layers=layers))
    assert logits_error(r, draw_tokens(3, LENGTH)) > 1e-6


@pytest.mark.usefixtures("float64_norms")
def test_a_norm_left_out_of_backward_shows(
    rig: Any, model_path: Any, draw_tokens: Any, random_adapter: Any, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    r = float64_rig(rig, model_path("qwen3"))
    assert gradient_error(r, draw_tokens, random_adapter, reference) < 1e-10
    monkeypatch.setattr(
        plain, "encode_heads_backward", lambda dy, x, norm, eps, cos, sin: functional.rotate(dy, cos, -sin)
    )
    assert gradient_error(r, draw_tokens, random_adapter, reference) > 1e-6


@pytest.mark.usefixtures("float64_norms")
@pytest.mark.parametrize("model", ("mistral", "qwen2"))
def test_a_full_mask_in_backward_shows(
    rig: Any, model_path: Any, draw_tokens: Any, random_adapter: Any, reference: Any, model: str
) -> None:
    r = float64_rig(rig, model_path(model))
    whole = r.executor.transformer
    full = Mask.create(Numerics(), 2, 512, None, torch.float64, torch.device("cpu"))

    class Broken:
        """The right forward; backward as if no layer had a window."""

        forward = whole.forward
        weights = whole.weights
        backward = replace(whole, kernels=replace(whole.kernels, masks=(full,) * 2)).backward

    r.executor.transformer = Broken()
    assert gradient_error(r, draw_tokens, random_adapter, reference) > 1e-6
