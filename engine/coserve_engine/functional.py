"""RMSNorm, rotary embedding and SwiGLU with their derivatives, as transformers' Llama defines them."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x [R, H] -> normalised rows [R, H] and 1 / rms [R, 1]."""
    rstd = torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)
    return x * rstd * weight, rstd


def rms_norm_backward(dy: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """dx [R, H] of `rms_norm` for dy [R, H]."""
    g = dy * weight
    return rstd * (g - x * (rstd * rstd) * (g * x).mean(-1, keepdim=True))


def rope_table(theta: float, size: int, positions: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """cos and sin [2, positions, size / 2]; angles in float32 as in transformers."""
    frequency = 1.0 / (theta ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size))
    angle = torch.outer(torch.arange(positions, dtype=torch.float32), frequency)
    return torch.stack([angle.cos(), angle.sin()]).to(device=device, dtype=dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [R, heads, D] with cos, sin [R, 1, D / 2]; its inverse, and its transpose, is sin
    -> -sin.
    """
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def swiglu_backward(dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(dgate, dup) of silu(gate) * up."""
    sigma = torch.sigmoid(gate)
    silu = gate * sigma
    return dh * up * (sigma * (1 + gate * (1 - sigma))), dh * silu
