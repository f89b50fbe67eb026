"""Kernels that were compiled without a GPU are those that a start on such a GPU looks for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SIZES: tuple[dict[str, Any], ...] = (
    {"kv_cache_bytes": 4 << 20, "max_requests": 40, "max_batch_tokens": 1024, "pass_tokens": 200, "max_rank": 32},
    {"kv_cache_bytes": 4 << 20, "max_requests": 9, "max_batch_tokens": 300, "pass_tokens": 200, "max_rank": 32},
)
START = """
import json, sys
from dataclasses import replace
from pathlib import Path
from triton import knobs
from triton.compiler import ASTSource
from coserve_engine import precompile
from coserve_engine.kernels.triton import cache

def forbidden(*arguments):
    raise SystemExit("it would be compiled")

model, kept, arch, changed = sys.argv[1:]
changed = json.loads(changed)
hits = []
knobs.compilation.listener = lambda **seen: hits.append(seen["cache_hit"])
if changed.pop("make", False):
    cache.keep_all(Path(kept))
else:
    ASTSource.make_ir = forbidden
    cache.keep(None, Path(kept))
config = replace(precompile.config_of(Path(model), "bfloat16", 256), **changed)
print(json.dumps([precompile.start(config, int(arch)), hits.count(True), hits.count(False)]))
"""


def started(model: str, kept: Path, arch: int = 90, **changed: Any) -> Any:
    """A process in which an engine starts: kinds of launches, those that were found, those that were compiled; or why
    it ended.
    """
    command = [sys.executable, "-c", START, model, str(kept), str(arch), json.dumps(changed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else done.stderr.strip()


@pytest.mark.parametrize("finetuning", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_a_start_finds_all_of_them(plain: str, tmp_path: Path, *, finetuning: bool) -> None:
    """Whatever the sizes of cache and batches, in a folder at another place. For another length, dtype or GPU, which
    is the control, it does not.
    """
    made = started(plain, tmp_path / "made", finetuning=finetuning, make=True)
    assert isinstance(made, list), made
    kinds, found, compiled = made
    assert (compiled, found) == (kinds, 0)
    assert kinds > 10
    moved = (tmp_path / "made").rename(tmp_path / "image")
    for sizes in SIZES if finetuning else SIZES[:1]:
        asked, found, compiled = started(plain, moved, finetuning=finetuning, **sizes)
        assert 10 < asked <= kinds  # small batches are not captured in blocks of many rows
        assert (found, compiled) == (asked, 0)
    others: tuple[dict[str, Any], ...] = ({"arch": 80}, {"max_model_length": 128}, {"dtype": "float32"})
    for changed in others if finetuning else others[:1]:
        assert started(plain, moved, finetuning=finetuning, **changed) == "it would be compiled"


@pytest.mark.parametrize(
    ("out", "arch", "said"),
    [("file", "90", "File exists"), ("made", "42", "--arch is 42; it must be one of 80, 86, 89, 90, 100, 120")],
)
def test_the_command_says_what_is_wrong(plain: str, tmp_path: Path, out: str, arch: str, said: str) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "coserve_engine.precompile", plain, "--arch", arch]
    command += ["--out", str(tmp_path / out), "--max-model-length", "256"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
