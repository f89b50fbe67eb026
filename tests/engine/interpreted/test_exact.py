"""With `numericsMode: Exact` the kernels give a request the bits that it has alone, and a job's gradients the bits that
they have tile by tile: in mixed batches, under any chunks, windows and units, after a preemption.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from random_models import Adapter
from tables import use_triton

from coserve_engine.config import LINEARS
from coserve_engine.kernels.triton.exact import ExactKernels
from coserve_engine.kernels.triton.table import TritonKernels
from coserve_engine.messages import (
    AdapterVersion,
    AddRequest,
    Command,
    ForwardBackward,
    IterationDone,
    LoraSpec,
    Pass,
    SamplingParams,
    StartJob,
    TokenBatch,
    TrainSeq,
)
from coserve_engine.numerics import Numerics
from coserve_engine.scheduler.plan import Kind, Segment
from coserve_engine.tensors.lora import LoraLayout

NUMERICS = Numerics(tile=16, page=16)
LENGTH, PROMPT = 44, 37
"""Of a sequence: more than two tiles, from which decode rows' keys would be split."""
NIGHTLY = pytest.mark.nightly
MODELS = [
    ("plain", "bfloat16"),
    pytest.param("qwen3", "float32", marks=NIGHTLY),
    pytest.param("mistral", "bfloat16", marks=NIGHTLY),
]
"""Minutes each in the interpreter."""
LENGTHS = (21, 3)


@pytest.fixture(autouse=True)
def _on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    use_triton(monkeypatch)


def make(rig: Any, mode: str, dtype: str, path: str | None = None) -> Any:
    r = rig(path, numerics_mode=mode, dtype=dtype, numerics=NUMERICS)
    assert type(r.executor.kernels) is (ExactKernels if mode == "exact" else TritonKernels)
    return r


def adapter(r: Any, rank: int, seed: int = 0, dropout: float = 0.0) -> Adapter:
    """Of all linears; neither of its factors is zero."""
    e = r.executor
    layout = e.layout(LoraSpec(rank, 2.0 * rank, LINEARS, dropout))
    drawn = 0.1 * torch.randn(layout.size, generator=torch.Generator().manual_seed(seed))
    return Trained(layout, drawn.to(e.dtypes.lora), e)


class Trained(Adapter):
    """As a job's, in the dtype that is computed in."""

    def __init__(self, layout: LoraLayout, flat: torch.Tensor, executor: Any) -> None:
        super().__init__(layout, flat)
        object.__setattr__(self, "_weights", executor.trained(layout, flat))

    @property
    def weights(self) -> Any:
        return self._weights  # type: ignore[attr-defined]


# ---- requests ----


class Company:
    """Other requests and a pass's windows and units beside a sequence, of drawn sizes."""

    def __init__(self, r: Any, draw_tokens: Any, seed: int) -> None:
        self._r, self._source = r, random.Random(seed)
        adapters = (None, adapter(r, 3, 1), adapter(r, 12, 2))
        self._others = [r.add(draw_tokens(n, 40), adapters[n % 3]) for n in range(5)]
        self._done = dict.fromkeys(self._others, 0)
        seqs = tuple(TrainSeq(n, draw_tokens(n, size), (0.01,) * size) for n, size in enumerate((20, 5)))
        self._state = r.open(Pass(7, "job", 0, 0, seqs), adapter(r, 5, 3, dropout=0.1), seed=3)

    def __call__(self) -> Sequence[Segment]:
        source, decodes, prompts = self._source, [], []
        for other in source.sample(self._others, source.randint(0, len(self._others))):
            length = source.choice((1, 1, 9))
            kind = Kind.DECODE if length == 1 else Kind.PREFILL
            (decodes if length == 1 else prompts).append(
                Segment(kind, other, self._done[other], length, sample=source.random() < 0.5)
            )
            self._done[other] += length
            if self._done[other] > 30:
                self._others.remove(other)
        windows = []
        if not self._state.forward_done:
            windows = [self._r.window(self._state, source.randint(1, 2))]
        elif not self._state.done:
            self._r.executor.backward(self._r.unit(self._state, source.randint(1, 2)))
        return [*decodes, *prompts, *windows]


def differing(r: Any, draw_tokens: Any, weights: Adapter | None, sizes: list[int], beside: Any = tuple) -> list[int]:
    """Positions of a sequence, cut into chunks of these sizes, whose logits are not those that it has when it is a
    prompt and then decoded, alone.
    """
    tokens = draw_tokens(5, LENGTH)
    alone = r.rows(r.add(tokens, weights), [PROMPT - 20, 20] + [1] * (LENGTH - PROMPT))
    found = r.rows(r.add(tokens, weights), sizes, beside=beside)
    both = alone.keys() & found.keys()
    assert len(both) > 1
    return sorted(at for at in both if not torch.equal(alone[at], found[at]))


CHUNKS = ([PROMPT + 3, 4], [5, 11, 1, 20, 1, 1, 4, 1], [1, PROMPT - 1, LENGTH - PROMPT])


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        pytest.param("bfloat16", CHUNKS[0], marks=NIGHTLY),
        pytest.param("float32", CHUNKS[1], marks=NIGHTLY),
        ("bfloat16", CHUNKS[2]),
    ],
)
def test_chunks_leave_no_trace(rig: Any, draw_tokens: Any, dtype: str, sizes: list[int]) -> None:
    r = make(rig, "exact", dtype)
    assert differing(r, draw_tokens, adapter(r, 4), sizes) == []


@NIGHTLY
@pytest.mark.parametrize(("model", "dtype"), MODELS)
def test_company_leaves_no_trace(rig: Any, model_path: Any, draw_tokens: Any, model: str, dtype: str) -> None:
    r = make(rig, "exact", dtype, model_path(model))
    mine = adapter(r, 4)
    decoded = [PROMPT - 20, 20] + [1] * (LENGTH - PROMPT)
    assert differing(r, draw_tokens, mine, decoded, Company(r, draw_tokens, 1)) == []


def test_the_fast_table_promises_less(rig: Any, draw_tokens: Any) -> None:
    """The control: a decode row of a long context is not what it is in a chunk."""
    r = make(rig, "fast", "bfloat16")
    assert differing(r, draw_tokens, adapter(r, 4), CHUNKS[0])


# ---- gradients ----


def gradient(r: Any, draw_tokens: Any, seed: int | None) -> tuple[torch.Tensor, float]:
    """Of a pass with dropout, tile by tile, or cut as `seed` draws."""
    source = random.Random(seed)
    seqs = tuple(TrainSeq(n, draw_tokens(n, size), (0.01,) * size) for n, size in enumerate(LENGTHS))
    drawn: Callable[[], int] = (lambda: 1) if seed is None else (lambda: source.randint(1, 3))
    weights = adapter(r, 5, 3, dropout=0.1)
    state = r.run_pass(Pass(1, "job", 0, 0, seqs), weights, window=drawn, unit=drawn)
    assert float(state.grads.abs().max()) > 0
    return state.grads, state.loss_sum()


@pytest.mark.parametrize(("model", "dtype"), MODELS)
def test_windows_and_units_leave_no_trace(rig: Any, model_path: Any, draw_tokens: Any, model: str, dtype: str) -> None:
    r = make(rig, "exact", dtype, model_path(model))
    grads, loss = gradient(r, draw_tokens, None)
    found = gradient(r, draw_tokens, 1)
    assert torch.equal(found[0], grads)
    assert found[1] == loss


def test_what_is_computed_again_has_the_same_bits(rig: Any, plain: str, draw_tokens: Any) -> None:
    keeps = make(rig, "exact", "bfloat16")
    again = rig(plain, numerics_mode="exact", dtype="bfloat16", numerics=NUMERICS, pass_bytes=1)
    assert torch.equal(gradient(keeps, draw_tokens, 1)[0], gradient(again, draw_tokens, 2)[0])


def test_the_fast_table_sums_losses_by_units(rig: Any, draw_tokens: Any) -> None:
    """The control."""
    r = make(rig, "fast", "float32")
    first = gradient(r, draw_tokens, None)
    found = gradient(r, draw_tokens, 1)
    assert torch.allclose(found[0], first[0], rtol=1e-3, atol=1e-5), "it is a gradient"
    assert found[1] != first[1] or not torch.equal(found[0], first[0])


# ---- the whole engine ----

VERSION = AdapterVersion("a", 1)
SMALL = Numerics(tile=16, page=4)
PAGE_BYTES = 1024
TIGHT = {"kv_cache_bytes": 13 * PAGE_BYTES, "max_batch_tokens": 40, "max_model_length": 40}
"""12 pages: those of two prompts and a pass, and not of two answers."""


def orders(draw_tokens: Any) -> list[AddRequest]:
    kinds: tuple[tuple[AdapterVersion | None, dict[str, Any]], ...] = (
        (None, {}),
        (VERSION, {"temperature": 1.0, "seed": 1}),
    )
    return [
        AddRequest(f"r{n}", draw_tokens(10 + n, 10), SamplingParams(16, ignore_eos=True, **how), 0.0, version)
        for n, (version, how) in enumerate(kinds)
    ]


def served(
    d: Any, rows: list[torch.Tensor], asked: list[AddRequest], *beside: Command
) -> dict[str, list[tuple[int, torch.Tensor]]]:
    """Of each request the tokens, and the logits that each was chosen from; `beside` comes when they decode."""
    rows.clear()
    d.submit(*asked)
    d.step()
    d.step()
    d.submit(*beside)
    d.run()
    assert d.failures == []
    found: dict[str, list[tuple[int, torch.Tensor]]] = {}
    tokens = [token for batch in d.of(TokenBatch) for token in batch.tokens]
    for token, row in zip(tokens, rows, strict=True):
        found.setdefault(token.request_id, []).append((token.token, row))
    return found


def engine_on(driver: Any, **settings: Any) -> Any:
    d = driver(numerics_mode="exact", dtype="bfloat16", numerics=SMALL, **settings)
    d.engine._adapters[VERSION] = adapter(d.engine, 6).weights
    return d


def test_preemption_and_a_job_leave_no_trace(driver: Any, draw_tokens: Any, sampled_logits: list[torch.Tensor]) -> None:
    asked = orders(draw_tokens)
    alone: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for one in asked:
        alone |= served(engine_on(driver), sampled_logits, [one])
    d = engine_on(driver, jitter_s=0.002, **TIGHT)
    d.submit(StartJob("job", LoraSpec(4, 8.0, LINEARS, 0.1), 1))
    d.step()
    seqs = (TrainSeq(0, draw_tokens(3, 16), (0.05,) * 16),)
    mixed = served(d, sampled_logits, asked, ForwardBackward("job", 1, Pass(1, "job", 0, 0, seqs)))
    assert d.engine.requests.preemptions > 0
    assert any(e.decode_tokens and (e.finetune_tokens or e.backward_tokens) for e in d.of(IterationDone))
    assert mixed.keys() == alone.keys()
    for name, expected in alone.items():
        for (token, row), (other, other_row) in zip(expected, mixed[name], strict=True):
            assert token == other
            assert torch.equal(row, other_row)
