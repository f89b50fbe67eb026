"""Where a server without Kubernetes keeps its jobs and adapters."""

from __future__ import annotations

from pathlib import Path


def state_folder(given: Path | None, model_name: str) -> Path:
    """The folder that was named, or the model's own in ~/.local/state/coserve."""
    return (given or Path.home() / ".local" / "state" / "coserve" / model_name).expanduser().absolute()
