"""Checking a folder of checksummed files, without torch: agents do it before they hand a folder to the engine."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from coserve_engine.errors import CheckpointError

MANIFEST = "manifest.json"


def digest(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_folder(path: Path, sha256: str | None = None) -> str:
    """Check every file of `path` against its manifest, and the manifest against `sha256` where given.

    Raises:
        CheckpointError: a file is missing or differs; the message names it.
    """
    manifest = path / MANIFEST
    try:
        found = digest(manifest)
        raw: dict[str, Any] = json.loads(manifest.read_text())["files"]
        files = {name: str(entry["sha256"]) for name, entry in raw.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{manifest}: not readable ({error}); the folder is incomplete") from None
    if sha256 is not None and found != sha256:
        raise CheckpointError(f"{manifest}: sha256 is {found}, expected {sha256}; the folder was changed")
    for name, expected in files.items():
        file = path / name
        if Path(name).name != name or not file.is_file():
            raise CheckpointError(f"{file}: named in the manifest but missing")
        if digest(file) != expected:
            raise CheckpointError(f"{file}: its checksum differs from the manifest; the file is corrupt")
    return found
