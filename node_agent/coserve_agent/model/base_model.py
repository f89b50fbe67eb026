"""What a published adapter's folder names as its base model, where PEFT's loaders look for it."""

from __future__ import annotations

import json
from pathlib import Path

from coserve_api.uris import parse_uri


def base_model(folder: Path, uri: str | None) -> str:
    """config.json's `_name_or_path`, where transformers leaves what a model was loaded from: a hub's name, or a folder
    if it is here; else the URI that the endpoint has, of a file its path; else the folder.
    """
    try:
        name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_name_or_path")
    except (OSError, ValueError, AttributeError):
        name = None  # the engine reads the file, too, and says what is wrong with it
    if isinstance(name, str) and name and _can_be_found(name):
        return name
    if uri is None:
        return str(folder)
    place = parse_uri(uri)
    return uri if place.claim is not None else place.path


def _can_be_found(name: str) -> bool:
    """Not a path of the machine on which the model was saved."""
    return not name.startswith(("/", ".", "~")) or (name.startswith("/") and Path(name).is_dir())
