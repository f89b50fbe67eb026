"""One server a directory, however the one before ended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from coserve_agent.errors import StartError
from coserve_agent.standalone.lock import DirectoryLock

HOLD = """
import sys, time
from pathlib import Path
from coserve_agent.standalone.lock import DirectoryLock
DirectoryLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_a_second_server_is_refused_and_told_which_has_it(tmp_path: Path) -> None:
    state = tmp_path / "state"
    lock = DirectoryLock(state)
    with pytest.raises(StartError) as refused:
        DirectoryLock(state)
    assert str(state) in str(refused.value)
    assert f"the server with process id {os.getpid()} has: end that one, or name another" in str(refused.value)
    lock.release()
    DirectoryLock(state).release()


def test_a_killed_server_holds_nothing(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(StartError, match=f"process id {holder.pid} "):
            DirectoryLock(tmp_path)
    finally:
        holder.kill()
        holder.communicate()
    DirectoryLock(tmp_path).release()


def test_a_directory_that_cannot_be_used_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartError, match="which cannot be used \\(Not a directory\\): name a directory"):
        DirectoryLock(tmp_path / "file" / "state")
