"""`coserve serve`, and `chat` and `bench` against it."""

from __future__ import annotations

import json
from pathlib import Path

import openai
import pytest
from cli_programs import Cli


def test_a_server_is_talked_to_measured_and_ended(cli: Cli, model_folder: Path) -> None:
    server, url = cli.serve(model_folder, "--name", "tiny")
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        assert [one.id for one in client.models.list()] == ["tiny"]
        wanted = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "one two"}], temperature=0, max_tokens=8
        )
    answered = cli("chat", "--url", url, "--temperature", 0, "--max-tokens", 8, "one two")
    assert (answered.returncode, answered.stdout) == (0, f"{wanted.choices[0].message.content}\n")
    piped = cli("chat", "--url", url, "--temperature", 0, "--max-tokens", 8, text="one two")
    assert piped.stdout == answered.stdout
    unknown = cli("chat", "--url", url, "--model", "huge", "x")
    assert unknown.returncode == 2 and "the server has tiny" in unknown.stderr

    short = ("--prompt-tokens", 16, "--output-tokens", 8)
    measured = cli("bench", url, "--rate", 20, "--requests", 12, *short, "--json")
    seen = json.loads(measured.stdout)
    assert measured.returncode == 0
    assert (seen["requests"], seen["failed"]) == (12, 0)
    assert (seen["prompt_tokens"], seen["output_tokens"]) == (12 * 16, 12 * 8)
    assert seen["ttft_ms"]["p50"] <= seen["ttft_ms"]["p99"] <= seen["e2e_ms"]["p99"]
    strict = cli("bench", url, "--requests", 2, "--rate", 50, *short, "--ttft-ms", 1e-6, "--json")
    assert json.loads(strict.stdout)["in_time_percent"] == 0
    assert "\nTTFT " in cli("bench", url, "--requests", 2, "--rate", 50, *short).stdout
    failing = cli("bench", url, "--requests", 2, "--rate", 50, "--output-tokens", 10_000, "--json")
    assert failing.returncode == 1
    (reason,) = json.loads(failing.stdout)["errors"]
    assert reason.startswith("400: This model's maximum context length is 256 tokens")

    server.interrupt()
    assert server.end() == 0
    assert "Traceback" not in server.said


def test_ctrl_c_while_the_model_loads_ends_it_quietly(cli: Cli, model_folder: Path) -> None:
    server = cli.start("serve", model_folder, "--port", 0)
    server.wait_for("loading")
    server.interrupt()
    server.end()
    assert "Traceback" not in server.said and "ERROR" not in server.said


def test_a_trace_is_replayed_at_a_rate(cli: Cli, model_folder: Path, tmp_path: Path) -> None:
    _, url = cli.serve(model_folder)
    trace = tmp_path / "trace.csv"
    rows = [f"2023-11-16 18:15:{n:02}.0000000,{10 + n},{4 + n}" for n in range(5)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    seen = json.loads(cli("bench", url, "--trace", trace, "--rate", 10, "--json").stdout)
    assert (seen["requests"], seen["failed"]) == (5, 0)
    assert (seen["prompt_tokens"], seen["output_tokens"]) == (sum(range(10, 15)), sum(range(4, 9)))
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n")
    broken = cli("bench", url, "--trace", trace)
    assert broken.returncode == 2 and f"{trace}, line 2: not a row of a trace" in broken.stderr


@pytest.mark.parametrize("model", ["no_tokenizer", "no_weights"])
def test_a_model_that_lacks_a_file_is_said(cli: Cli, model_folder: Path, tmp_path: Path, model: str) -> None:
    folder = tmp_path / model
    folder.mkdir()
    missing = "tokenizer.json" if model == "no_tokenizer" else "model.safetensors"
    for path in model_folder.iterdir():
        if path.name != missing:
            (folder / path.name).symlink_to(path)
    done = cli("serve", folder, "--port", 0)
    assert done.returncode == 1
    assert f"{folder / missing}: no such file" in done.stderr.splitlines()[-1]
