"""All that requests and jobs may ask of a device, asked once at start-up: an operator's kernels are loaded when it is
first used, which on CUDA takes milliseconds that no request should wait for.
"""

from __future__ import annotations

import torch

from coserve_engine.config import LINEARS
from coserve_engine.layout.choices import Seen
from coserve_engine.layout.passes import pages_of_pass
from coserve_engine.messages import LoraSpec, Pass, SamplingParams, TrainSeq
from coserve_engine.model.executor import Executor
from coserve_engine.model.sequences import SequenceRows
from coserve_engine.scheduler.plan import Kind, Segment, Unit
from coserve_engine.tensors.adam import AdamState, AdamW
from coserve_engine.tensors.lora import LoraLayout, LoraWeights

OWNER, PASS_ID = "rehearsal", -1
PENALISED = SamplingParams(1, repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.1)
CHOICES = (
    SamplingParams(1),
    SamplingParams(1, temperature=1.0),
    SamplingParams(1, temperature=1.0, top_p=0.9, min_p=0.01, top_k=5),
    PENALISED,
    SamplingParams(1, logit_bias=((0, 1.0),), logprobs=1),
)
"""Every way to choose a token."""


def rehearse(executor: Executor) -> None:
    """Run it; nothing is left of it but what was loaded."""
    for dropout in (0.0, 0.1) if executor.config.finetuning else (0.0,):
        layout = executor.layout(LoraSpec(1, 1.0, LINEARS, dropout))
        param = layout.fresh(0, executor.dtypes.lora, executor.device)
        adapter = executor.trained(layout, param)
        if dropout == 0.0:
            _serve(executor, adapter)
        if executor.config.finetuning:
            _learn(executor, adapter, layout, param)


def _serve(executor: Executor, adapter: LoraWeights) -> None:
    """A row for every choice, one with an adapter, and a prompt of its own whose tokens are scored: short, after the
    tokens that these chose, and of more than a tile.
    """
    numerics, count = executor.numerics, len(CHOICES)
    most = min(executor.config.max_model_length - 1, executor.config.max_batch_tokens - count - 1)
    short, long = min(numerics.row_multiple + 1, most), min(numerics.tile + 1, most)
    place, first = executor.counts.take([1], [1], 2)
    seen = {PENALISED: Seen(place, first + 1)}
    pages = executor.ledger.reserve(OWNER, numerics.pages(long + 1), tainted=True)
    for last, length in ((1, short), (-1, short), (1, long)):
        tokens = [*[1] * (length - 1), last]
        rows = {
            slot: SequenceRows(tokens, pages, None, None, params, (0,), seen.get(params))
            for slot, params in enumerate(CHOICES)
        }
        rows[count] = SequenceRows(tokens, pages, adapter)
        rows[count + 1] = SequenceRows([1] * (length + 1), pages, adapter, scored=1)
        segments = (
            *(Segment(Kind.DECODE, slot, length - 1, 1, sample=True) for slot in range(count + 1)),
            Segment(Kind.PREFILL, count + 1, 0, length, sample=True),
        )
        forwarded = executor.forward(segments, rows)
        assert forwarded is not None  # nobody ends it
        executor.sample(forwarded).collect(executor.model.vocab_size)
    executor.counts.give(place)
    executor.ledger.free(OWNER)


def _learn(executor: Executor, adapter: LoraWeights, layout: LoraLayout, param: torch.Tensor) -> None:
    """A pass, tile by tile and whole, and a step."""
    numerics = executor.numerics
    length = min(numerics.tile + 2, executor.config.max_model_length, executor.config.max_batch_tokens)
    for step in (1, numerics.tiles(length)):
        work = Pass(PASS_ID, OWNER, 0, 0, (TrainSeq(0, (1,) * length, (1.0,) * length),))
        pages = executor.ledger.reserve(f"pass:{PASS_ID}", pages_of_pass((length,), numerics))
        state = executor.open_pass(work, adapter, layout, pages, want_logprobs=True)
        while not state.forward_done:
            executor.forward((state.shape.window(state.fwd_tile, state.fwd_tile + step),), {})
        while not state.done:
            executor.backward(Unit(PASS_ID, state.layer, max(0, state.end_tile - step), state.end_tile))
        grad = torch.zeros_like(param)
        grad += state.grads
        executor.close_pass(PASS_ID)
    how = AdamW(lr=0.0, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, max_grad_norm=1.0)
    executor.kernels.optimize(param, grad, AdamState.zeros(param), how)
    adapter.renew()
