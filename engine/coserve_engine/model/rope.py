"""The angles of rotary embedding, plain and stretched, with the rounding of transformers' `modeling_rope_utils`."""

from __future__ import annotations

import math

import torch

from coserve_engine.config import LinearScaling, Llama3Scaling, Rope, YarnScaling


def rope_table(rope: Rope, size: int, positions: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """cos and sin [2, positions, size] for heads of `size`, each angle once for either half of a head, the sine
    negative in the first; angles in float32 as in transformers.
    """
    frequency, factor = frequencies(rope, size)
    angle = torch.outer(torch.arange(positions, dtype=torch.float32), frequency)
    cos, sin = angle.cos(), angle.sin()
    table = torch.stack([torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)])
    return (table * factor).to(device=device, dtype=dtype)


def frequencies(rope: Rope, size: int) -> tuple[torch.Tensor, float]:
    """Radians per position [size / 2], float32, and the factor on cos and sin."""
    period = rope.theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    plain = 1.0 / period
    match rope.scaling:
        case None:
            return plain, 1.0
        case LinearScaling(factor):
            return plain / factor, 1.0
        case Llama3Scaling():
            return _llama3(plain, rope.scaling), 1.0
        case YarnScaling():
            return _yarn(period, rope.theta, rope.scaling), rope.scaling.attention_factor


def _llama3(plain: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    original, low, high = scaling.original_positions, scaling.low_factor, scaling.high_factor
    wave = 2 * math.pi / plain
    ramp = (original / wave - low) / (high - low)
    between = (1 - ramp) * plain / scaling.factor + ramp * plain
    stretched = torch.where(wave > original / low, plain / scaling.factor, between)
    return torch.where(wave < original / high, plain, stretched)


def _yarn(period: torch.Tensor, theta: float, scaling: YarnScaling) -> torch.Tensor:
    count = period.shape[0]

    def dimension(turns: float) -> float:
        """The (fractional) dimension that turns so often within the original positions."""
        return 2 * count * math.log(scaling.original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * count - 1)
    if low == high:
        high += 0.001  # no division by zero
    kept = 1 - ((torch.arange(count, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return 1.0 / (scaling.factor * period) * (1 - kept) + 1.0 / period * kept
