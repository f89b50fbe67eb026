"""Choosing tokens.

Randomness is addressed, not drawn: (seed, position) names the number, so a replay chooses the same token.
"""

from __future__ import annotations

import torch

from coserve_engine.messages import SamplingParams

_MASK = (1 << 64) - 1


def sample_u(seed: int, position: int) -> float:
    """A number in [0, 1) for a request's seed and the position of the token (SplitMix64, Steele et al.

    2014, two rounds).
    """

    def mix(z: int) -> int:
        z = (z + 0x9E3779B97F4A7C15) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        return z ^ (z >> 31)

    return (mix(mix(seed & _MASK) ^ position) >> 11) * 2.0**-53


def sample(logits: torch.Tensor, params: SamplingParams, position: int) -> int:
    """A token from logits [vocab] for the token at `position`: greedy, or by temperature within the nucleus of
    top_p.
    """
    if params.temperature == 0:
        return int(logits.argmax())
    p = torch.softmax(logits.double() / params.temperature, -1)
    p, order = p.sort(descending=True, stable=True)
    mass = p.cumsum(-1)
    nucleus = int((mass < params.top_p).sum()) + 1
    mass = mass[: min(nucleus, p.shape[0])]
    u = sample_u(params.seed, position) * float(mass[-1])
    return int(order[min(int(torch.searchsorted(mass, u, right=True)), mass.shape[0] - 1)])
