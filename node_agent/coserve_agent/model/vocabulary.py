"""How many tokens a model has rows for, from its config.json alone: the feeder has no torch to read the model with."""

from __future__ import annotations

import json
from pathlib import Path

from coserve_agent.errors import StartError

FILE = "config.json"


def vocab_size(folder: Path) -> int:
    """The model's vocab_size. Raises StartError naming file, field and remedy."""
    path = folder / FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StartError(f"{path}: not readable as JSON ({error}); copy the model folder again") from None
    size = config.get("vocab_size") if isinstance(config, dict) else None
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise StartError(f"{path}: vocab_size is {size!r}; it must be a whole number from 1 on: copy config.json again")
    return size
