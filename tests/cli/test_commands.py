"""What every command has in common: help at once, exit statuses, one line that says what is wrong."""

from __future__ import annotations

import subprocess
import sys

import pytest
from cli_programs import Cli

from coserve_cli.main import COMMANDS

HEAVY = ("torch", "transformers", "fastapi", "coserve_agent")


def test_help_and_completion_import_nothing_heavy() -> None:
    code = (
        "import sys\nfrom coserve_cli.main import main\n"
        "try:\n    main(['--help'], prog_name='coserve')\nexcept SystemExit as end:\n    assert end.code == 0\n"
        f"assert not [name for name in {HEAVY} if name in sys.modules]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(cli: Cli, command: str) -> None:
    done = cli(command, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"Usage: coserve {command} ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sing"], "No such command 'sing'"),
        (["serve"], "Missing argument 'MODEL'"),
        (["serve", "m", "--max-rank", "1000"], "'--max-rank': '1000'"),
        (["serve", "m", "--kv-cache-memory", "1.5Zi"], "'--kv-cache-memory': '1.5Zi' must be a quantity of bytes"),
        (["serve", "hf:one"], "'hf:one': write hf:ORG/NAME"),
        (["bench", "--rate", "0"], "'--rate'"),
        (["export", "nowhere", "--merge", "x"], "nowhere: no adapter_config.json there"),
        (["export", "nowhere"], "say where to write"),
    ],
)
def test_what_is_typed_wrong_is_said_and_ends_with_2(cli: Cli, arguments: list[str], words: str) -> None:
    done = cli(*arguments)
    assert done.returncode == 2
    assert words in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "no/where"], "no/where: no such folder; of the Hugging Face hub write hf:no/where"),
        (["serve", "."], "has no config.json"),
        (["plan", "nowhere"], "nowhere: no such folder"),
        (["chat", "--url", "http://127.0.0.1:9", "hello"], "nothing listens on http://127.0.0.1:9; start a server"),
        (["bench", "http://127.0.0.1:9"], "nothing listens on http://127.0.0.1:9"),
    ],
)
def test_what_cannot_be_done_is_said_and_ends_with_1(cli: Cli, arguments: list[str], words: str) -> None:
    done = cli(*arguments)
    assert done.returncode == 1
    assert words in done.stderr.splitlines()[-1]


def test_without_the_agents_packages_the_remedy_is_said() -> None:
    code = (
        "import sys\nfrom importlib import util\nreal = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name in ('torch', 'fastapi') else real(name, *rest)\n"
        "from coserve_cli.main import main\nmain(['serve', 'm'], prog_name='coserve')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "fastapi, torch are not installed" in line and "'coserve[agent]'" in line
