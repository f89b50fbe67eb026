"""An adapter in PEFT's format as an engine serves it: the linears that its tensors name, each with the rank and scale
that PEFT gives it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from coserve_engine.config import LINEARS, ModelConfig
from coserve_engine.errors import AdapterFolderError
from coserve_engine.formats.adapter_config import ADAPTER_CONFIG, AdapterConfig, read_adapter_config
from coserve_engine.formats.tensor_file import DTYPES, load_tensors
from coserve_engine.tensors.lora import Factors

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
CONVERT = (
    'python -c "import torch, safetensors.torch as s; '
    f"t = torch.load('{PICKLE}', map_location='cpu', weights_only=True); "
    f"s.save_file({{k: v.contiguous() for k, v in t.items()}}, '{ADAPTER_WEIGHTS}')\""
)
"""A shell command that makes safetensors of a pickle beside it."""


def module_name(layer: int, linear: str) -> str:
    """A linear's place in transformers' model."""
    block = "mlp" if linear in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    return f"model.layers.{layer}.{block}.{linear}"


def tensor_name(module: str, part: str) -> str:
    """PEFT's name of `part` A or B of a module."""
    return f"base_model.model.{module}.lora_{part}.weight"


def read_adapter(folder: Path, model: ModelConfig, max_rank: int, dtype: torch.dtype) -> tuple[dict[str, Factors], ...]:
    """Per layer: linear name -> its factors, for the linears that the folder's tensors name; on the host.

    Raises:
        AdapterFolderError: a file is missing or broken, the adapter is not plain LoRA, a rank is above `max_rank`, or a
            tensor is unknown, lacks its other half, has another shape, or is not finite.
    """
    config = read_adapter_config(folder)
    values = model.layers * sum(max_rank * sum(model.linear_shape(name)) for name in LINEARS)
    weights = _Weights(folder, config, max_rank, dtype, values)
    layers = tuple(
        {name: found for name in LINEARS if (found := weights.take(layer, name, *model.linear_shape(name)))}
        for layer in range(model.layers)
    )
    weights.check_all_taken(layers)
    return layers


class _Weights:
    """The tensors of adapter_model.safetensors, from which what has a place in the model is taken."""

    def __init__(
        self, folder: Path, config: AdapterConfig, max_rank: int, dtype: torch.dtype, most_values: int
    ) -> None:
        self._path, self._config, self._max_rank, self._dtype = folder / ADAPTER_WEIGHTS, config, max_rank, dtype
        if not self._path.exists() and (folder / PICKLE).exists():
            raise AdapterFolderError(
                f"{folder / PICKLE}: a pickle, which may run code when it is read; where you trust it, make "
                f"{ADAPTER_WEIGHTS} of it, in its folder: {CONVERT}"
            )
        try:
            self._tensors = load_tensors(folder, ADAPTER_WEIGHTS, most_values)
        except (OSError, ValueError) as error:
            raise AdapterFolderError(f"{self._path}: {error}") from None

    def take(self, layer: int, linear: str, out: int, into: int) -> Factors | None:
        """The factors of a linear [out, into]; None where it is not adapted."""
        module = module_name(layer, linear)
        names = [tensor_name(module, part) for part in "AB"]
        if not any(name in self._tensors for name in names):
            return None
        rank = self._config.rank_of(module)
        if rank > self._max_rank:
            field = "r" if rank == self._config.rank else "rank_pattern"
            raise AdapterFolderError(
                f"{self._config.path}: {field} is {rank} for {module}; this endpoint allows 1 to {self._max_rank} "
                "(finetuning.maxRank)"
            )
        a, b = (self._tensor(name, shape) for name, shape in zip(names, ((rank, into), (out, rank)), strict=True))
        return Factors(a, b, self._config.scale_of(module))

    def _tensor(self, name: str, shape: tuple[int, int]) -> torch.Tensor:
        found = self._tensors.pop(name, None)
        if found is None:
            raise AdapterFolderError(
                f"{self._path}: tensor {name!r} is missing, its other half is there; save it again"
            )
        if found.shape != shape:
            raise AdapterFolderError(
                f"{self._path}: tensor {name!r} has shape {tuple(found.shape)}, this model and {ADAPTER_CONFIG} need "
                f"{shape}; was it trained on another model?"
            )
        if found.dtype not in DTYPES:
            kinds = ", ".join(sorted(str(each) for each in DTYPES))
            raise AdapterFolderError(f"{self._path}: tensor {name!r} is of {found.dtype}; it must be one of {kinds}")
        value = found.to(self._dtype)
        if not torch.isfinite(value).all():
            raise AdapterFolderError(f"{self._path}: tensor {name!r} has values that are not finite")
        return value

    def check_all_taken(self, layers: tuple[Mapping[str, Factors], ...]) -> None:
        known = f"names are {tensor_name(module_name(0, LINEARS[0]), 'A')!r} to layer {len(layers) - 1}, of {LINEARS}"
        if self._tensors:
            raise AdapterFolderError(
                f"{self._path}: tensor {min(self._tensors)!r} has no place in this model; {known}; was it trained on "
                "another model, or are other modules adapted?"
            )
        if not any(layers):
            raise AdapterFolderError(f"{self._path}: holds no tensor, so it adapts nothing; {known}")
