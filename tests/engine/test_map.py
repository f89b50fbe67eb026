"""The map in docs/engine.md names every module of the engine in the room where it lies, and none that is not there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "engine" / "coserve_engine"
PAGE = (ROOT / "docs" / "engine.md").read_text()


def modules() -> set[tuple[str, str]]:
    """(room, module) of every file; the room of those at the top is the package."""
    files = (path for path in PACKAGE.rglob("*.py") if not path.stem.startswith("__"))
    return {(path.parent.relative_to(PACKAGE).as_posix().replace(".", PACKAGE.name), path.stem) for path in files}


def named(page: str) -> set[tuple[str, str]]:
    """(room, module) of every name in the map."""
    rooms = page.split("\n## Rooms\n")[1].split("\n## ", maxsplit=1)[0].split("\n- **")[1:]
    return {(room.split("**")[0], name) for room in rooms for name in re.findall(r"`(\w+)`", room)}


def test_the_map_is_the_territory() -> None:
    assert named(PAGE) == modules()


def test_a_module_that_moved_would_be_found() -> None:
    """The control."""
    assert named(PAGE.replace("- **tensors**", "- **memory**")) != modules()
    assert named(PAGE.replace("`fair`", "")) != modules()
