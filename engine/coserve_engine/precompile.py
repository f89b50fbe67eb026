"""Compile a model's kernels for a GPU that is not here: `python -m coserve_engine.precompile MODEL --arch 90 --out
FOLDER`. A start that finds the folder (`COSERVE_IMAGE_KERNELS`) compiles none of them.

An engine is started as on a GPU, on tensors without values: of MODEL only config.json is read.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from coserve_engine.config import EngineConfig
from coserve_engine.device.fake import NoValues
from coserve_engine.errors import EngineConfigError, EngineError
from coserve_engine.formats.model_folder import read_model_config
from coserve_engine.model.executor import Executor
from coserve_engine.model.loading import HEAD
from coserve_engine.model.rehearsal import rehearse
from coserve_engine.startup import COMPUTED
from coserve_engine.tensors.dtypes import Dtypes
from coserve_engine.tensors.kv_cache import KVCache

SEQUENCES = 2
"""Of the longest length, that the cache holds."""
FEW_REQUESTS = 4
"""Each of a hundred numbers of decode rows would be captured, and none asks for another kernel."""


def empty_tensors(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """In the place of `read_tensors`: all of them, without values."""
    left_out = {HEAD} if read_model_config(folder).tied else set()
    return ((name, torch.empty(shapes[name], dtype=dtype, device=device)) for name in shapes.keys() - left_out)


def start(config: EngineConfig, arch: int) -> int:
    """Compile all that an engine of `config` on an sm_`arch` compiles at its start; how many kinds of launches.

    Raises:
        EngineConfigError: there is no such architecture, or kernels cannot compute the model.
    """
    from coserve_engine.kernels.triton.absent import SHARED, absent  # noqa: PLC0415  (for Linux alone)
    from coserve_engine.kernels.triton.launch import compiled  # noqa: PLC0415

    if arch not in SHARED:
        raise EngineConfigError(f"--arch is {arch}; it must be one of {', '.join(map(str, SHARED))}")
    before = compiled()
    with absent(arch), warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # which are as aligned as others
        executor = Executor(config, NoValues(torch.device("cuda")), empty_tensors)
        executor.capture()
        rehearse(executor)
    return compiled() - before


def config_of(folder: Path, dtype: str, max_model_length: int) -> EngineConfig:
    """An engine that asks for every kind of launch; sizes of its cache and batches change none."""
    config = EngineConfig(str(folder), max_model_length=max_model_length, dtype=dtype, device="cuda")
    page = KVCache.page_bytes(read_model_config(folder), config.numerics, Dtypes.of(dtype).cache)
    pages = SEQUENCES * (config.numerics.pages(config.numerics.pad(max_model_length)) + 1)
    return replace(config, kv_cache_bytes=pages * page, max_requests=FEW_REQUESTS)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m coserve_engine.precompile", description=__doc__)
    parser.add_argument("model", type=Path, help="a folder with the model's config.json")
    parser.add_argument("--arch", type=int, action="append", required=True, help="80, 90, 100, ...; again for several")
    parser.add_argument("--out", type=Path, required=True, help="where to; COSERVE_IMAGE_KERNELS of the agent")
    parser.add_argument("--dtype", choices=COMPUTED, default="bfloat16", help="engine.dtype of the endpoint")
    parser.add_argument("--max-model-length", type=int, default=1024, help="model.maxModelLength of the endpoint")
    options = parser.parse_args()
    from coserve_engine.kernels.triton.cache import keep_all  # noqa: PLC0415  (for Linux alone)

    try:
        places = keep_all(options.out)
        for arch in options.arch:
            started = time.monotonic()
            count = start(config_of(options.model, options.dtype, options.max_model_length), arch)
            print(f"sm_{arch}: {count} kinds of launches in {time.monotonic() - started:.0f} s")
    except (EngineError, OSError) as error:
        print(f"precompile: {error}", file=sys.stderr)
        return 1
    return 0 if places.written is not None else 1  # it was full, which the log says


if __name__ == "__main__":
    sys.exit(main())
