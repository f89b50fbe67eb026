"""The probe at start-up is silent where kernels keep a row's bits and a pass's gradients, and names what does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mutants import mutant
from tables import use_triton

from coserve_engine.kernels.protocol import DOWN, GATE_UP, OUTPUT, QKV
from coserve_engine.kernels.triton import gemm, lora_backward, table
from coserve_engine.kernels.triton.bound import Tables
from coserve_engine.model.probe import differing_operations
from coserve_engine.model.probe_units import ask_units
from coserve_engine.model.probe_words import Asked
from coserve_engine.numerics import Numerics

GROUPS = tuple(", ".join(group) for group in (QKV, OUTPUT, GATE_UP, DOWN))
NUMERICS = Numerics(tile=16, page=16)


@pytest.fixture(autouse=True)
def _on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    use_triton(monkeypatch)


def executor(rig: Any, path: str | None = None, **settings: Any) -> Any:
    return rig(path, **{"numerics_mode": "exact", "numerics": NUMERICS, **settings}).executor


@pytest.mark.parametrize(
    ("model", "dtype"), [("plain", "float32"), pytest.param("qwen3", "bfloat16", marks=pytest.mark.nightly)]
)
def test_it_is_silent_where_all_is_exact(rig: Any, model_path: Any, model: str, dtype: str) -> None:
    e = executor(rig, model_path(model), dtype=dtype)
    free = e.ledger.free_pages
    assert differing_operations(e) == ()
    assert e.ledger.free_pages == free
    assert e.passes == {}


def test_decode_rows_whose_keys_are_split_are_named(rig: Any) -> None:
    e = executor(rig, finetuning=False)
    e.kernels = replace(e.kernels, tables=Tables(e.model.layers))
    assert differing_operations(e) == ("attention",)


def test_products_that_depend_on_the_number_of_rows_are_named(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = gemm.product

    def product(x: torch.Tensor, weight: torch.Tensor, *bias: Any, **how: Any) -> torch.Tensor:
        """Few rows are summed from the other end."""
        if x.shape[0] < NUMERICS.tile:
            x, weight = x.flip(1), weight.flip(1)
        return real(x, weight, *bias, **how)

    monkeypatch.setattr(gemm, "product", product)
    odd = differing_operations(executor(rig, finetuning=False))
    assert odd == (*GROUPS, *(f"{group} with an adapter" for group in GROUPS))


def test_gradients_that_are_summed_first_tile_first_are_named(
    rig: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = mutant(lora_backward, tmp_path, "(end - 1) * TILE_STRIDE", "first * TILE_STRIDE")
    other = mutant(other, tmp_path, "tl.maximum(end - 2 - step, first)", "tl.minimum(first + 1 + step, end - 1)")
    monkeypatch.setattr(table, "lora_gradient", other.lora_gradient)
    asked = Asked(executor(rig))
    ask_units(asked)
    assert asked.odd == tuple(f"{group} backward: gradients" for group in GROUPS)
