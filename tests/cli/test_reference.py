"""docs/cli.md is what the commands say of themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"


def test_the_page_is_written_by_the_commands() -> None:
    done = subprocess.run([sys.executable, "-m", "coserve_cli.reference"], capture_output=True, text=True, check=True)
    assert PAGE.read_text() == done.stdout, "write it anew: python -m coserve_cli.reference >docs/cli.md"
