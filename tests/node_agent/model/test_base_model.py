"""The base model that an adapter's folder names is one that a loader finds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coserve_agent.model.base_model import base_model


@pytest.mark.parametrize(
    ("config", "uri", "expected"),
    [
        ({"_name_or_path": "org/base-1b"}, "pvc://models/tiny", "org/base-1b"),
        ({"_name_or_path": "base"}, "pvc://models/tiny", "base"),
        ({"_name_or_path": "/"}, "pvc://models/tiny", "/"),
        ({"_name_or_path": "/home/somebody/run-3"}, "pvc://models/tiny", "pvc://models/tiny"),
        ({"_name_or_path": "./"}, "pvc://models/tiny", "pvc://models/tiny"),
        ({"_name_or_path": ""}, "pvc://models/tiny", "pvc://models/tiny"),
        ({"_name_or_path": None}, "file:///models/tiny/", "/models/tiny"),
        ({}, "pvc://models/tiny", "pvc://models/tiny"),
        ({}, None, "FOLDER"),
    ],
)
def test_the_hubs_name_goes_before_the_uri(
    tmp_path: Path, config: dict[str, str], uri: str | None, expected: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert base_model(tmp_path, uri) == expected.replace("FOLDER", str(tmp_path))


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_config_that_does_not_read_is_the_engines_to_refuse(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert base_model(tmp_path, "pvc://m/x") == "pvc://m/x"
