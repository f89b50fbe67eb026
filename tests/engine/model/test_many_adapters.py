"""Rows of many adapters in one batch: each has the bits that its sequence has alone."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from coserve_engine.config import LINEARS
from coserve_engine.device.protocol import Staged
from coserve_engine.formats.artifacts import peft_files, write_folder
from coserve_engine.kernels import lora
from coserve_engine.kernels.lora import ScatteredRows
from coserve_engine.messages import AdapterVersion, AddRequest, LoadAdapter, SamplingParams
from coserve_engine.scheduler.plan import Kind, Segment
from coserve_engine.serving.requests import Request

LENGTH = 41
SHAPES = (
    (4, LINEARS),
    (8, LINEARS),
    (13, LINEARS),
    (16, ("q_proj", "v_proj")),
    (64, ("down_proj",)),
    (32, LINEARS),
)
"""Rank and targets of each adapter; four requests use the second, none uses the last linears of the fourth."""
USES = (0, 1, 2, 3, 4, 5, 1, None, 1, None, 1)


def adapters(rig: Any, random_adapter: Any) -> list[Any]:
    made = [random_adapter(rig.executor, rank, seed, targets) for seed, (rank, targets) in enumerate(SHAPES)]
    return [None if use is None else made[use] for use in USES]


def differing(rig: Any, draw_tokens: Any, random_adapter: Any, seed: int) -> int:
    """Sequences whose last logits, decoded beside the others, are not those of a prompt computed alone."""
    r, source = rig(), random.Random(seed)
    used = adapters(r, random_adapter)
    alone = []
    for n, adapter in enumerate(used):
        slot = r.add(draw_tokens(n, LENGTH), adapter)
        alone.append(r.forward(Segment(Kind.PREFILL, slot, 0, LENGTH, sample=True))[slot])
    r.clear()
    slots = [r.add(draw_tokens(n, LENGTH), adapter) for n, adapter in enumerate(used)]
    done = [source.choice((LENGTH - 1, LENGTH - 5, LENGTH - 9)) for _ in slots]
    for slot, rows in zip(slots, done, strict=True):
        r.forward(Segment(Kind.PREFILL, slot, 0, rows))
    kinds = [Kind.DECODE if rows == LENGTH - 1 else Kind.PREFILL for rows in done]
    rest = [Segment(k, s, n, LENGTH - n, sample=True) for k, s, n in zip(kinds, slots, done, strict=True)]
    source.shuffle(rest)
    together = r.forward(*sorted(rest, key=lambda segment: segment.kind is Kind.PREFILL))
    return sum(not torch.equal(together[slot], expected) for slot, expected in zip(slots, alone, strict=True))


@pytest.mark.parametrize("seed", range(6))
def test_a_batch_of_many_adapters(rig: Any, draw_tokens: Any, random_adapter: Any, seed: int) -> None:
    assert differing(rig, draw_tokens, random_adapter, seed) == 0


def test_rows_without_padding_break_it(
    rig: Any, draw_tokens: Any, random_adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "MKL_CBWR" in os.environ:
        pytest.skip("MKL is asked to sum any number of rows alike")
    monkeypatch.setattr(lora, "repeat_last", lambda rows, multiple: rows)
    assert differing(rig, draw_tokens, random_adapter, 0) > 0


def test_rows_written_where_they_were_not_read_break_it(
    rig: Any, draw_tokens: Any, random_adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ScatteredRows.put

    def shifted(*parts: Any) -> Callable[[Staged], ScatteredRows]:
        put = real(*parts)

        def bind(staged: Staged) -> ScatteredRows:
            made = put(staged)
            return replace(made, rows=made.rows.roll(1))

        return bind

    monkeypatch.setattr(ScatteredRows, "put", shifted)
    assert differing(rig, draw_tokens, random_adapter, 0) > 0


@pytest.mark.parametrize("ordered", (True, False))
def test_requests_of_one_adapter_are_neighbours(
    driver: Any, draw_tokens: Any, random_adapter: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, ordered: bool
) -> None:
    """Two adapters with four requests each, which come in turns: decode gathers rows only where nobody orders them."""
    d = driver()
    versions = [AdapterVersion(name, 1) for name in "ab"]
    for version in versions:
        adapter = random_adapter(d.engine.executor)
        write_folder(tmp_path / version.uid, *peft_files(adapter.layout, adapter.flat, "base"))
        d.submit(LoadAdapter(version, str(tmp_path / version.uid)))
    d.run()
    if not ordered:
        monkeypatch.setattr(Request, "adapter_order", 0)
    gathered: list[str] = []
    real = ScatteredRows.add
    monkeypatch.setattr(ScatteredRows, "add", lambda self, *rest: (gathered.append(rest[-1]), real(self, *rest)))
    for n in range(8):
        params = SamplingParams(4, ignore_eos=True)
        d.submit(AddRequest(f"r{n}", draw_tokens(n, 20), params, 0.0, versions[n % 2]))
    d.step()  # the prompts, in order of arrival
    gathered.clear()
    d.run()
    assert (not gathered) == ordered
