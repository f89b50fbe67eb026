"""Which dtype is used where: what is multiplied, what is cached, what an optimizer changes, what sums are made in."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from coserve_engine.errors import EngineConfigError


@dataclass(frozen=True, slots=True)
class Dtypes:
    """The dtypes of one engine.

    Args:
        compute: weights, hidden rows, what a pass keeps of them, and served adapters.
        cache: keys and values.
        lora: an adapter that trains, its gradients and its optimizer's state.
        accumulate: log-sum-exps, gradients of keys and values, logits, log-probabilities and losses.
    """

    compute: torch.dtype
    cache: torch.dtype
    lora: torch.dtype
    accumulate: torch.dtype

    @classmethod
    def of(cls, name: str) -> Dtypes:
        """Of EngineConfig's `dtype`.

        Raises:
            EngineConfigError: there is none of this name.
        """
        found = _DTYPES.get(name)
        if found is None:
            raise EngineConfigError(f"dtype is {name!r}; it must be one of {', '.join(_DTYPES)}")
        return found


def _all(dtype: torch.dtype) -> Dtypes:
    return Dtypes(dtype, dtype, dtype, dtype)


_DTYPES = {
    "bfloat16": Dtypes(torch.bfloat16, torch.bfloat16, torch.float32, torch.float32),
    "float32": _all(torch.float32),
    "float64": _all(torch.float64),
}
