"""Norm and rotation of heads, and their way to the pages, against complex numbers in float64."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from bounds import close
from mutants import mutant
from torch.nn import functional

from coserve_engine.config import Rope
from coserve_engine.kernels.triton import encode
from coserve_engine.model.rope import rope_table

EPS, POSITIONS, PLACES, FIRST, PASS_ROWS = 1e-5, 100, 37, 3, 12
SHAPES = [(1, 1, 1, 16), (3, 4, 2, 16), (4, 5, 3, 24), (2, 6, 2, 96)]
NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """T rows whose queries, keys and values are columns of one tensor, and what encoding them takes."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    rope: torch.Tensor
    positions: torch.Tensor
    write: torch.Tensor

    @classmethod
    def drawn(cls, dtype: torch.dtype, rows: int, heads: int, kv_heads: int, size: int, *, normed: bool) -> Case:
        draw = torch.Generator().manual_seed(rows + heads + size)
        fused = torch.full((rows + 2, (heads + 2 * kv_heads) * size + 8), NAN)
        fused[1:-1, :-8] = torch.randn(rows, fused.shape[1] - 8, generator=draw)
        whole = fused.to(dtype)[1:-1, :-8].unflatten(1, (-1, size))
        q, k, v = whole.split([heads, kv_heads, kv_heads], 1)
        norms = [torch.randn(size, generator=draw).to(dtype) if normed else None for _ in range(2)]
        rope = rope_table(Rope(10000.0), size, POSITIONS, torch.float32, torch.device("cpu"))
        positions = torch.randint(POSITIONS, (rows,), generator=draw)
        return cls(q, k, v, *norms, rope, positions, torch.randperm(PLACES, generator=draw)[:rows])

    def pools(self) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = torch.full((2, self.k.shape[1], PLACES, self.k.shape[2]), -7.0, dtype=self.q.dtype)
        return k, v

    def turned(self, x: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
        """The truth: halves of normed heads are real and imaginary parts, to be turned by the position's angles."""
        size = x.shape[-1]
        if norm is not None:
            x = functional.rms_norm(x, (size,), norm.double(), EPS)
        cos, sin = self.rope[:, self.positions, size // 2 :].double()
        z = torch.complex(*x.chunk(2, -1)) * torch.complex(cos, sin).unsqueeze(1)
        return torch.cat([z.real, z.imag], -1)


def check_forward(of: Any, raced: Any, case: Case) -> None:
    q, k, v, q_norm, k_norm = case.q, case.k, case.v, case.q_norm, case.k_norm

    def run() -> tuple[torch.Tensor, ...]:
        pools = case.pools()
        return of.forward(q, k, v, q_norm, k_norm, EPS, case.rope, case.positions, case.write, *pools), *pools

    encoded, k_pool, v_pool = raced(run)
    close(encoded, case.turned(q.double(), q_norm), q.dtype, sums=2)
    close(k_pool[:, case.write].transpose(0, 1), case.turned(k.double(), k_norm), q.dtype, sums=2)
    assert torch.equal(v_pool[:, case.write].transpose(0, 1), v)
    for pool in (k_pool, v_pool):
        pool[:, case.write] = -7.0
        assert bool((pool == -7.0).all()), "nothing else is written"
    (again,) = raced(lambda: (of.queries(q, q_norm, EPS, case.rope, case.positions),))
    assert torch.equal(again, encoded)


def check_backward(of: Any, raced: Any, case: Case, dq_dtype: torch.dtype = torch.float32) -> None:
    rows, kv_heads, size = case.k.shape
    draw = torch.Generator().manual_seed(7)
    dq = torch.randn(case.q.shape, generator=draw).to(dq_dtype)
    dkv = torch.full((2, kv_heads, PASS_ROWS, size), NAN)
    mine = dkv[:, :, FIRST : FIRST + rows]
    mine.copy_(torch.randn(mine.shape, generator=draw))
    rest = (case.q_norm, case.k_norm, EPS, case.rope, case.positions)
    k = None if case.k_norm is None else case.k
    found = raced(lambda: of.backward(dq, mine, case.q, k, *rest))
    befores, norms = (case.q, case.k), (case.q_norm, case.k_norm)
    true = []
    for d, x, norm in zip((dq, mine[0].transpose(0, 1)), befores, norms, strict=True):
        wide = x.double().requires_grad_()
        true += torch.autograd.grad(case.turned(wide, norm), wide, d.double())
    for one, expected in zip(found, [*true, mine[1].transpose(0, 1).double()], strict=True):
        assert one.dtype == case.q.dtype
        close(one, expected, case.q.dtype, sums=8 if case.q_norm is not None else 2)
    heads = case.q.shape[1]
    assert {one.stride(0) for one in found} == {(heads + 2 * kv_heads) * size}, "columns of one tensor"
    assert [one.storage_offset() for one in found] == [0, heads * size, (heads + kv_heads) * size]


@pytest.mark.parametrize("normed", [False, True], ids=["bare", "normed"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("elements", [64, 2048])
def test_heads_of_a_row(
    raced: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, shape: Any, normed: bool, elements: int
) -> None:
    """In one block, and in several whose last is ragged."""
    monkeypatch.setattr(encode, "ELEMENTS", elements)
    for made_once in (encode._sizes, encode._constants):
        made_once.cache_clear()
    case = Case.drawn(dtype, *shape, normed=normed)
    check_forward(encode, raced, case)
    check_backward(encode, raced, case)


def test_gradients_of_queries_in_the_dtype_of_rows(raced: Any, dtype: torch.dtype) -> None:
    check_backward(encode, raced, Case.drawn(dtype, 2, 3, 1, 16, normed=True), dtype)


def test_what_a_norm_needs_is_asked_for() -> None:
    case = Case.drawn(torch.float32, 2, 3, 1, 16, normed=True)
    dkv = torch.zeros(2, 1, 2, 16)
    with pytest.raises(ValueError, match="needs what was normalised"):
        encode.backward(case.q, dkv, case.q, None, case.q_norm, case.k_norm, EPS, case.rope, case.positions)


def test_each_element_of_a_head_counts_once(dtype: torch.dtype) -> None:
    """A head for each element, in which it alone is large: what it is divided by tells whether it was summed."""
    size = 24
    heads = (torch.eye(size) * 1000).to(dtype).unsqueeze(0)
    case = Case.drawn(dtype, 1, 1, 1, size, normed=True)
    norm, still = torch.ones(size, dtype=dtype), torch.zeros(1, dtype=torch.int64)
    encoded = encode.queries(heads, norm, EPS, case.rope, still)
    close(encoded[0], torch.eye(size).double() * size**0.5, dtype, sums=1)


MUTANTS = {
    "a turn the other way": (
        "return a * cos - b * sin, b * cos + a * sin",
        "return a * cos + b * sin, b * cos - a * sin",
    ),
    "the sine of the first half": ("SIZE + SIZE // 2\n", "SIZE\n"),
    "another position": ("tl.load(positions_ptr + row)", "tl.load(positions_ptr + row) // 2"),
    "another row": ("row * K_STRIDE", "row * (K_STRIDE - 8)"),
    "another place": ("(head * places + tl.load(write_ptr + row))", "(head * places + tl.load(write_ptr + row) // 2)"),
    "another head's page": ("head * places", "head * (places - 1)"),
    "heads that are not there": ("mask = (head < HEADS)[:, None] & ", "mask = (head < HEADS - 1)[:, None] & "),
    "half a head and less": ("(column < SIZE // 2)[None, :]", "(column < SIZE // 2 - 1)[None, :]"),
    "a mean of a half": ("tl.sum(a * a + b * b, 1) / SIZE", "tl.sum(a * a + b * b, 1) / HALF"),
    "a turn back that is none": ("dy_b * cos - dy_a * sin", "dy_b * cos + dy_a * sin"),
    "a pass of other rows": ("(head * pass_rows + row)", "(head * (pass_rows - 1) + row)"),
    "keys' gradients for values'": ("pass_rows.to(tl.int64) * (KV_HEADS * SIZE)", "pass_rows.to(tl.int64) * 0"),
    "a derivative without rstd": ("* (rstd * rstd)", "* rstd"),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=MUTANTS.keys())
def test_what_is_wrong_on_purpose_is_seen(raced: Any, tmp_path: Path, change: tuple[str, str]) -> None:
    wrong, case = mutant(encode, tmp_path, *change), Case.drawn(torch.float32, 4, 5, 3, 24, normed=True)
    with pytest.raises(AssertionError):
        check_forward(wrong, raced, case)
        check_backward(wrong, raced, case)
