"""What the choice of tokens takes of a GPU at the vocabulary of Llama-3.1-8B, compiled without one."""

from __future__ import annotations

import pytest
import torch
from compiled import BLACKWELL, compile_for, launches

from coserve_engine.device.protocol import Columns, Staged
from coserve_engine.kernels.sampling import BoundChoices
from coserve_engine.kernels.triton import sampling
from coserve_engine.layout.choices import Choice, ChoiceLayout
from coserve_engine.messages import SamplingParams

ROWS, VOCAB = 64, 128256


def cut() -> None:
    columns = Columns()
    choice = Choice(SamplingParams(max_tokens=1, temperature=1.0, top_p=0.9), 0)
    put = BoundChoices.put(ChoiceLayout.of([choice] * ROWS, VOCAB, 4), columns)
    ints = torch.empty(len(columns.all_ints), dtype=torch.int64, device="cuda")
    floats = torch.empty(len(columns.all_floats), dtype=torch.float64, device="cuda")
    p, u = torch.empty(ROWS, VOCAB, device="cuda"), torch.empty(ROWS, 1, dtype=torch.float64, device="cuda")
    sampling.draw(p, put(Staged(ints, floats)), u)


@pytest.mark.parametrize("arch", [80, 90, BLACKWELL])
def test_a_choice_takes_little(arch: int) -> None:
    usages = [compile_for(arch, launched) for launched in launches(cut)]
    summary, _ = usages
    assert summary.wide_loads > 0
    for usage in usages:
        assert usage.spills == 0
        assert usage.atomics == 0
        assert usage.narrow_loads == 0
        assert usage.blocks >= 1
