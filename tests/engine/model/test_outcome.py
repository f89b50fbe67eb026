"""What requests get of a forward comes back from one row of numbers as it went in."""

from __future__ import annotations

import pytest
import torch

from coserve_engine.device.cpu import CpuDevice
from coserve_engine.layout.batch import BatchLayout, Scored
from coserve_engine.layout.choices import Choice
from coserve_engine.messages import MAX_LOGPROBS, SamplingParams
from coserve_engine.model import outcome
from coserve_engine.model.outcome import Sampled


def layout_of(wanted: list[int | None], scored: tuple[Scored, ...]) -> BatchLayout:
    choices = tuple(Choice(SamplingParams(1, logprobs=top), 1) for top in wanted)
    slots = tuple(range(len(wanted)))
    return BatchLayout((), (), (), (), (), (), (), (), slots, choices, scored, 0)


@pytest.mark.parametrize("vocab", (8, 300))
@pytest.mark.parametrize("tops", (False, True))
def test_numbers_come_back(vocab: int, tops: bool) -> None:
    """With more of the likeliest than there are tokens, too."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(3, vocab, generator=generator)
    logits[1, 2] = float("inf")
    logp, chosen = logits.log_softmax(-1), torch.tensor([1, 3, 7])
    prompt = torch.randn(2, vocab, generator=generator).log_softmax(-1)
    wanted: list[int | None] = [None, 0, 5 if tops else 0]
    reports = outcome.report(logp[1:], chosen[1:], tops=tops)
    scores = outcome.report(prompt, torch.tensor([4, 6]), tops=True)
    numbers = torch.cat([chosen.double(), outcome.finite(logits).double(), reports, scores])
    scored = (Scored(9, 0, (4, 6), MAX_LOGPROBS),)
    sampled = Sampled(layout_of(wanted, scored), CpuDevice(torch.device("cpu")).fetch(numbers))
    found, of_prompt = sampled.collect(vocab)
    assert [one.token for one in found] == [1, 3, 7]
    assert [one.finite for one in found] == [True, False, True]
    assert found[0].logprobs is None
    last = found[2].logprobs
    assert last is not None
    assert last.logprob == float(logp[2, 7])
    assert last.rank == int((logp[2] >= logp[2, 7]).sum())
    best = logp[2].topk(5)
    assert last.top == (tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)) if tops else ())
    assert [one.logprob for one in of_prompt[9]] == [float(prompt[0, 4]), float(prompt[1, 6])]
    assert [len(one.top) for one in of_prompt[9]] == [min(MAX_LOGPROBS, vocab)] * 2
