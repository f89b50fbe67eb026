"""RMSNorm, rotary embedding and SwiGLU with their derivatives, as transformers' Llama and Qwen3 define them; and the
padding of rows.
"""

from __future__ import annotations

import torch


def repeat_last_row(rows: torch.Tensor, multiple: int) -> torch.Tensor:
    """rows [N, ...] with the last one repeated up to a multiple of so many; `rows` itself where none lacks."""
    lacking = -rows.shape[0] % multiple
    return torch.cat([rows, rows[-1:].expand(lacking, *rows.shape[1:])]) if lacking else rows


def inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / root mean square of each row: [..., N] -> [..., 1]."""
    return (x * x).mean(-1, keepdim=True).add_(eps).rsqrt_()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., N] -> normalised rows [..., N] and 1 / rms [..., 1]."""
    rstd = inverse_rms(x, eps)
    return (x * rstd).mul_(weight), rstd


def rms_norm_backward(dy: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """dx [..., N] of `rms_norm` for dy [..., N]."""
    g = dy * weight
    share = (g * x).mean(-1, keepdim=True).mul_(rstd * rstd)
    return g.addcmul_(x, share, value=-1).mul_(rstd)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [R, heads, D] with cos, sin [R, 1, D] of `rope_table`; its transpose is sin -> -sin."""
    a, b = x.chunk(2, -1)
    return torch.cat([b, a], -1).mul_(sin).addcmul_(x, cos)


def encode_heads(
    x: torch.Tensor, norm: torch.Tensor | None, eps: float, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Queries or keys [R, heads, D] as attention takes them: normalised by `norm` [D] where there is one, rotated."""
    return rotate(x if norm is None else rms_norm(x, norm, eps)[0], cos, sin)


def encode_heads_backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    norm: torch.Tensor | None,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> torch.Tensor:
    """dx [R, heads, D] of `encode_heads`; `x` may be None where there is no norm."""
    dy = rotate(dy, cos, -sin)
    if norm is None:
        return dy
    if x is None:
        raise ValueError("the derivative of a norm needs what was normalised")
    return rms_norm_backward(dy, x, inverse_rms(x, eps), norm)


def swiglu_backward(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, silu: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dgate, dup) of silu(gate) * up; dup takes the place of `silu`, which is silu(gate)."""
    dgate = dh * up
    torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
    return dgate, silu.mul_(dh)


def log_probabilities(scores: torch.Tensor) -> torch.Tensor:
    """Log-softmax of logits [N, vocab], in their place: what training, evaluation and sampling all report.

    N must be a multiple of the row multiple, as for the GEMM before it: the sum of a lone row may be split over
    threads, and then has other bits.
    """
    return scores.sub_(torch.logsumexp(scores, -1, keepdim=True))
