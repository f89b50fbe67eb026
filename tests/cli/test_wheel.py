"""The wheel outside of the checkout: by itself it says what it lacks, beside the agent's packages it serves."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
START_S = 180.0


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and what it needs at least."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", folder, ROOT], check=True)
    (wheel,) = folder.glob("coserve-*.whl")
    venv.create(folder / "venv")
    subprocess.run([*pip, "--python", folder / "venv/bin/python", "install", wheel], check=True)
    return folder / "venv"


def bare() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}


def test_by_itself_it_says_what_it_lacks(installed: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [installed / "bin/coserve", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", env=bare())

    assert run("--version").stdout.startswith("coserve ")
    assert "  serve " in run("--help").stdout
    done = run("serve", "model")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "torch" in line and "pipx install --force 'coserve[agent]'" in line


def test_with_the_agents_packages_it_serves(installed: Path, model_folder: Path, tmp_path: Path) -> None:
    (site,) = installed.glob("lib/python*/site-packages")
    ours = sysconfig.get_paths()["purelib"]
    (site / "agent.pth").write_text(f"{ours}\n")  # not what its own .pth files name: the checkout
    log = tmp_path / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [installed / "bin/coserve", "serve", model_folder, "--port", "0", "--state", tmp_path / "state"],
            stderr=output, cwd="/", env=bare(), start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + START_S
        while not (found := re.search(r"ready in .*: (http://\S+)/v1,", log.read_text())):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        chat = [installed / "bin/coserve", "chat", "--url", found[1], "--max-tokens", "3", "one"]
        assert subprocess.run(chat, capture_output=True, check=False, cwd="/", env=bare()).returncode == 0
        where = subprocess.run(
            [installed / "bin/python", "-c", "import coserve_agent; print(coserve_agent.__file__)"],
            capture_output=True, text=True, check=True, cwd="/", env=bare(),
        )  # fmt: skip
        assert where.stdout.startswith(str(site))
        os.killpg(server.pid, signal.SIGINT)
        assert server.wait(60) == 0
    finally:
        if server.poll() is None:
            server.kill()
            server.wait(20)
