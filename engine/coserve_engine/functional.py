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
    return torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., N] -> normalised rows [..., N] and 1 / rms [..., 1]."""
    rstd = inverse_rms(x, eps)
    return x * rstd * weight, rstd


def rms_norm_backward(dy: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """dx [..., N] of `rms_norm` for dy [..., N]."""
    g = dy * weight
    return rstd * (g - x * (rstd * rstd) * (g * x).mean(-1, keepdim=True))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [R, heads, D] with cos, sin [R, 1, D / 2]; its transpose is sin -> -sin."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


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


def swiglu_backward(dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(dgate, dup) of silu(gate) * up."""
    sigma = torch.sigmoid(gate)
    silu = gate * sigma
    return dh * up * (sigma * (1 + gate * (1 - sigma))), dh * silu
