"""What the start of an engine consists of, by its own log: loading, calibration and the trial of rows, for a random
Llama of 135 million parameters with the widths of SmolLM2, or a model folder.

Calibration is held to its budget: 5 s, or a tenth of the loading where that is more.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from random_model import write_random_model

from coserve_engine.config import EngineConfig
from coserve_engine.host import set_environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    set_environment(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        widths = {"hidden": 576, "intermediate": 1536, "heads": 9, "kv_heads": 3, "vocabulary": 49152}
        path = options.model or write_random_model(Path(folder), layers=30, tied=True, **widths)
        begin = time.monotonic()
        from coserve_engine.engine import Engine  # noqa: PLC0415  (as an engine's process does)

        engine = Engine(EngineConfig(str(path), threads=options.threads))
        notes = engine.ready().notes
        print(f"started in {time.monotonic() - begin:.1f} s", *notes, sep="\n")


if __name__ == "__main__":
    main()
