"""Packing for the base model's training: every document once, none sees another, the loss is that of single ones."""

from dataclasses import replace

import pytest
import torch
from base_folder import model_config
from hypothesis import given
from hypothesis import strategies as st
from packing import IGNORED, Rows, best_fit, pack
from train_base import loss_function, rate_factor
from transformers import LlamaConfig, LlamaForCausalLM

TOLERANCE = 1e-5
DOCUMENTS = [[5, 6, 7, 8, 9], [10, 11, 12], [13, 14], [15, 16, 17, 18]]


@given(st.lists(st.integers(1, 40), max_size=60))
def test_best_fit_places_every_document_once_in_rows_that_hold_them(lengths: list[int]) -> None:
    rows = best_fit(lengths, 40)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= 40 for row in rows)
    assert len(rows) <= 2 * sum(lengths) / 40 + 1


def test_rows_restart_positions_and_keep_documents_apart() -> None:
    rows = pack([[1, 2, 3], [4, 5], [6, 7, 8, 9]], row_tokens=6, pad_id=0)
    assert rows.tokens.tolist() == [[6, 7, 8, 9, 4, 5], [1, 2, 3, 0, 0, 0]]
    assert rows.labels.tolist() == [[7, 8, 9, IGNORED, 5, IGNORED], [2, 3, *[IGNORED] * 4]]
    assert rows.positions.tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 0, 0]]
    assert rows.mask()[0, 0, 4].tolist() == [False] * 4 + [True, False]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**model_config() | {"initializer_range": 0.2})).float()


def single_losses(model: LlamaForCausalLM) -> float:
    """The summed loss of the documents, each in a row of its own."""
    loss_of = loss_function(model, compiled=False, mixed=False)
    return sum(loss_of(pack([ids], row_tokens=len(ids), pad_id=0)).item() for ids in DOCUMENTS)


def packed_loss(model: LlamaForCausalLM, rows: Rows) -> float:
    return loss_function(model, compiled=False, mixed=False)(rows).item()


def test_packed_loss_is_that_of_single_documents(model: LlamaForCausalLM) -> None:
    rows = pack(DOCUMENTS, row_tokens=8, pad_id=0)
    assert rows.tokens.shape == (2, 8)
    assert packed_loss(model, rows) == pytest.approx(single_losses(model), rel=TOLERANCE)


def test_packed_loss_differs_when_documents_see_each_other(model: LlamaForCausalLM) -> None:
    rows = pack(DOCUMENTS, row_tokens=8, pad_id=0)
    leaking = replace(rows, document=torch.zeros_like(rows.document))
    assert packed_loss(model, leaking) != pytest.approx(single_losses(model), rel=TOLERANCE)


def test_rate_warms_up_holds_and_falls_to_zero() -> None:
    assert rate_factor(0, 0.0) == pytest.approx(1 / 40)
    assert [rate_factor(step, progress) for step, progress in ((39, 0.1), (400, 0.5))] == [1.0, 1.0]
    assert [rate_factor(600, progress) for progress in (0.75, 1.0)] == pytest.approx([0.5, 0.0])
