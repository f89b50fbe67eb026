"""What generation_config.json may say of sampling, and what an agent says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig as TransformersConfig

from coserve_agent.agent import request_defaults
from coserve_agent.errors import StartError
from coserve_agent.model.generation_config import FILE, SamplingDefaults, sampling_defaults
from coserve_agent.settings import AgentSettings
from coserve_api.endpoint import GenerationConfig


def written(folder: Path, content: Any) -> Path:
    (folder / FILE).write_text(json.dumps(content))
    return folder


def test_only_what_stands_in_the_file_counts(tmp_path: Path) -> None:
    assert sampling_defaults(tmp_path) == SamplingDefaults()
    assert sampling_defaults(written(tmp_path, {"do_sample": True, "eos_token_id": 3})) == SamplingDefaults()
    qwen = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "do_sample": True}
    expected = SamplingDefaults(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05)
    assert sampling_defaults(written(tmp_path, qwen)) == expected
    assert str(expected) == "temperature 0.7, top_p 0.8, top_k 20, repetition_penalty 1.05"
    assert str(SamplingDefaults()) == "neutral"


def test_what_transformers_writes_is_read(tmp_path: Path) -> None:
    said = {"temperature": 0.6, "top_k": 40, "min_p": 0.05, "max_new_tokens": 99}
    TransformersConfig(do_sample=True, **said).save_pretrained(tmp_path)
    expected = SamplingDefaults(temperature=0.6, top_k=40, min_p=0.05, max_tokens=99)
    assert sampling_defaults(tmp_path) == expected


def test_null_is_neutral_and_a_point_is_no_fraction(tmp_path: Path) -> None:
    written(tmp_path, {"temperature": None, "top_k": 20.0, "top_p": 1, "max_new_tokens": 8.0})
    assert sampling_defaults(tmp_path) == SamplingDefaults(top_k=20, max_tokens=8)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", value) for value in ("hot", -0.1, 2.5, float("nan"), True, [1])),
        *(("top_p", value) for value in (1.5, -1, "0.9")),
        *(("top_k", value) for value in (1.5, -2, "20", False, 1e300)),
        *(("min_p", value) for value in (2, -0.1)),
        *(("repetition_penalty", value) for value in (0, -1, float("inf"))),
        *(("max_new_tokens", value) for value in (0, -5, 1.5, "all")),
    ],
)
def test_a_wrong_value_is_explained(tmp_path: Path, field: str, value: object) -> None:
    with pytest.raises(StartError) as caught:
        sampling_defaults(written(tmp_path, {field: value}))
    shown = int(value) if value == 1e300 else value
    for word in (str(tmp_path / FILE), f"{field} is {shown!r}", "correct the file", "Neutral"):
        assert word in str(caught.value)


@pytest.mark.parametrize(("source", "words"), [("Model", "temperature 0.25, top_k 7"), ("Neutral", "neutral")])
def test_the_log_says_which_defaults_hold(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, source: GenerationConfig, words: str
) -> None:
    """Neutral does not read the file's values, right or wrong."""
    written(tmp_path, {"temperature": 0.25, "top_k": 7})
    settings = AgentSettings(model_path=tmp_path, generation_config=source)
    with caplog.at_level("INFO", "coserve_agent.agent"):
        defaults = request_defaults(settings)
    assert str(defaults) == words
    assert f"where a request does not say: {words} (COSERVE_GENERATION_CONFIG {source})" in caplog.text
    written(tmp_path, {"temperature": "hot"})
    if source == "Neutral":
        assert request_defaults(settings) == SamplingDefaults()
    else:
        with pytest.raises(StartError, match="temperature is 'hot'"):
            request_defaults(settings)
