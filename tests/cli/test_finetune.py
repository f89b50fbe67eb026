"""`coserve finetune`: with a server of its own and with one that runs, and Ctrl-C in the middle."""

from __future__ import annotations

import json
from pathlib import Path

import openai
import pytest
from cli_programs import Cli

OPTIONS = ("--name", "parrot", "--batch-size", 2, "--checkpoint-every", 50, "--rank", 4, "--seed", 3)
LONG = (*OPTIONS, "--steps", 400)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    turns = [
        [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": "one two three four"[: 3 + n % 9]}]
        for n in range(40)
    ]
    path.write_text("\n".join(json.dumps({"messages": each}) for each in turns))
    return path


def weights(output: str) -> bytes:
    """Of the adapter whose folder was printed."""
    return (Path(output.strip()) / "adapter_model.safetensors").read_bytes()


def test_ctrl_c_saves_and_the_same_command_goes_on(cli: Cli, model_folder: Path, rows: Path, tmp_path: Path) -> None:
    whole = cli("finetune", model_folder, rows, "--state", tmp_path / "whole", *LONG)
    assert whole.returncode == 0, whole.stderr
    assert "parrot: Completed, step 400 of 400, loss " in whole.stderr

    state = tmp_path / "parted"
    first = cli.start("finetune", model_folder, rows, "--state", state, *LONG)
    first.wait_for(r"Running, step [1-9]")
    first.interrupt()
    assert first.end() == 130
    assert "job parrot is saved; go on with the same command" in first.said
    assert "Traceback" not in first.said
    second = cli("finetune", model_folder, rows, "--state", state, *LONG)
    assert second.returncode == 0, second.stderr
    assert "job parrot is there at step " in second.stderr
    assert weights(second.stdout) == weights(whole.stdout)

    again = cli("finetune", model_folder, rows, "--state", state, *LONG)
    assert again.returncode == 1
    assert "a job parrot is there, and Completed; choose another with --name" in again.stderr
    _, url = cli.serve(model_folder, "--state", state)
    answered = cli("chat", "--url", url, "--model", "parrot", "--temperature", 0, "--max-tokens", 6, "say 1")
    assert answered.returncode == 0 and "one" in answered.stdout


def test_a_server_that_runs_trains_beside_its_requests(
    cli: Cli, model_folder: Path, rows: Path, tmp_path: Path
) -> None:
    server, url = cli.serve(model_folder, "--state", tmp_path / "state")
    second = cli("serve", model_folder, "--port", 0, "--state", tmp_path / "state")
    assert second.returncode == 1 and str(tmp_path / "state") in second.stderr.splitlines()[-1]
    job = cli.start("finetune", url, rows, *OPTIONS, "--steps", 2000)
    job.wait_for(r"Running, step [1-9]")
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        assert client.completions.create(model=model_folder.name, prompt="one", max_tokens=3).choices[0].text
    job.interrupt()
    assert job.end() == 130
    assert "parrot: Suspended, step " in job.said and "go on with the same command" in job.said
    goes_on = cli.start("finetune", url, rows, *OPTIONS, "--steps", 2000)
    goes_on.wait_for(r"Running, step [1-9]")
    server.interrupt()
    assert server.end() == 0
    assert goes_on.end() == 1
    assert f"nothing listens on {url}" in goes_on.said or url in goes_on.said.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{rows}x"], "no such file"),
        (["{rows}", "--learning-rate", "fast"], "learningRate"),
        (["{rows}", "--eval-percent", "0", "--publish", "IfEvalImproves"], "need held-out samples"),
    ],
)
def test_what_the_job_may_not_have_is_said(
    cli: Cli, model_folder: Path, rows: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    given = [one.format(rows=rows) for one in arguments]
    done = cli("finetune", model_folder, *given, "--state", tmp_path / "state")
    assert done.returncode == 1
    assert words in done.stderr
