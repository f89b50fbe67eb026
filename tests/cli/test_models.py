"""MODEL as hf:ORG/NAME, against a server of the hub's protocol. The real hub was never asked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_programs import Cli
from hub import Hub, serving

CHUNK = 10 << 20
"""What huggingface_hub writes at once: what broke off within one is asked for again."""


@pytest.fixture
def hub(model_folder: Path, tmp_path: Path, cli: Cli) -> Iterator[Hub]:
    folder = tmp_path / "hub"
    folder.mkdir()
    for path in model_folder.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    with serving(Hub(folder, "org/tiny")) as made:
        cli.environment |= {"HF_ENDPOINT": made.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
        yield made


def test_a_model_is_downloaded_once(cli: Cli, hub: Hub) -> None:
    done = cli("plan", "hf:org/tiny", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tiny: ")
    assert "model.safetensors" in hub.sent and "pytorch_model.bin" not in hub.sent
    before = {name: list(parts) for name, parts in hub.sent.items()}
    assert cli("plan", "hf:org/tiny@main", "--device", "cpu").stdout == done.stdout
    assert hub.sent == before
    cli.environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    assert cli("plan", "hf:org/tiny", "--device", "cpu").stdout == done.stdout
    unknown = cli("plan", "hf:org/other", "--device", "cpu")
    assert unknown.returncode == 1
    assert "is not in the cache of this machine, and the hub cannot be reached" in unknown.stderr


def test_a_connection_that_breaks_is_gone_on_with_where_it_was(cli: Cli, hub: Hub) -> None:
    large = hub.folder / "vocab.json"
    large.write_bytes(os.urandom(3 * CHUNK))
    hub.breaks["vocab.json"] = 2 * CHUNK + 5
    assert cli("plan", "hf:org/tiny", "--device", "cpu").returncode == 0
    assert hub.sent["vocab.json"] == [(0, 2 * CHUNK + 5), (2 * CHUNK, CHUNK)]
    (copy,) = Path(cli.environment["HF_HOME"]).rglob("snapshots/*/vocab.json")
    assert copy.read_bytes() == large.read_bytes()


def test_a_download_that_broke_off_keeps_the_files_that_are_whole(cli: Cli, hub: Hub) -> None:
    (hub.folder / "vocab.json").write_bytes(os.urandom(CHUNK))
    hub.breaks["vocab.json"] = 5
    hub.away = {"vocab.json"}
    broken = cli("plan", "hf:org/tiny", "--device", "cpu")
    assert broken.returncode == 1
    assert "run the same command again" in broken.stderr.splitlines()[-1]
    whole = {name: list(parts) for name, parts in hub.sent.items() if name != "vocab.json"}
    hub.away = set()
    assert cli("plan", "hf:org/tiny", "--device", "cpu").returncode == 0
    again = {name for name, parts in hub.sent.items() if parts != whole.get(name)}
    assert "model.safetensors" in whole and "vocab.json" in again and "model.safetensors" not in again


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("hf:org/none", "hf:org/none: no such repository, or a private one"),
        ("hf:org/tiny@v9", "hf:org/tiny@v9: the repository has no revision 'v9'"),
    ],
)
def test_what_the_hub_has_not_is_said(cli: Cli, hub: Hub, model: str, words: str) -> None:
    done = cli("plan", model)
    assert done.returncode == 1
    assert words in done.stderr.splitlines()[-1]
