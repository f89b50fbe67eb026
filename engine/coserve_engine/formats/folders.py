"""Folders of checksummed files, without torch: replaced whole, and checked before an agent hands one to the engine."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from coserve_engine.errors import CheckpointError
from coserve_engine.formats.opened import TEXT_BYTES, check_beneath, opened

MANIFEST = "manifest.json"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NOT_HERE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)
"""What a kernel or a file system (NFS, for one) says that cannot exchange."""


def _exchange(a: Path, b: Path) -> bool:
    """Let two folders change names at once (Linux's renameat2). False where that cannot be done here."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NOT_HERE:
        return False
    raise OSError(number, os.strerror(number), str(a), None, str(b))


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def replace_folder(scratch: Path, path: Path) -> None:
    """Give `scratch` the name `path`; an older folder of that name is removed afterwards.

    Whenever this is cut short, `path` is the old or the new folder, once `restore_folder` was called where the file
    system cannot exchange two names at once.
    """
    restore_folder(path)
    if not path.exists():
        scratch.rename(path)
    elif _exchange(scratch, path):
        shutil.rmtree(scratch)
    else:
        path.rename(_aside(path))
        scratch.rename(path)
        shutil.rmtree(_aside(path))


def restore_folder(path: Path) -> None:
    """Undo a replacement that was cut short. Only for whoever may write `path`."""
    aside = _aside(path)
    if not aside.exists():
        return
    if path.exists():
        shutil.rmtree(aside)
    else:
        aside.rename(path)


def digest(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal_folder(path: Path) -> str:
    """Write the manifest of all files in `path`; returns its sha256, which covers them."""
    names = sorted(file.name for file in path.iterdir() if file.name != MANIFEST)
    files = {name: {"sha256": digest(path / name), "bytes": (path / name).stat().st_size} for name in names}
    (path / MANIFEST).write_text(json.dumps({"version": 1, "files": files}, indent=1, sort_keys=True))
    return digest(path / MANIFEST)


def verify_folder(path: Path, sha256: str | None = None, root: Path | None = None) -> str:
    """Check every file of `path` against its manifest, and the manifest against `sha256` where given. No link is
    followed: of the files, of `path`, and of the folders from `root` down to it where that is given.

    Raises:
        CheckpointError: a file is missing or differs; the message names it.
    """
    manifest = path / MANIFEST
    try:
        if root is not None:
            check_beneath(root, path)
        with opened(path, MANIFEST) as file:
            content = file.read(TEXT_BYTES)
    except OSError as error:
        raise CheckpointError(f"{manifest}: not readable ({error}); the folder is incomplete") from None
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256:
        raise CheckpointError(f"{manifest}: sha256 is {found}, expected {sha256}; the folder was changed")
    try:
        raw: dict[str, Any] = json.loads(content)["files"]
        files = {name: str(entry["sha256"]) for name, entry in raw.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{manifest}: not readable ({error}); the folder is incomplete") from None
    for name, expected in files.items():
        try:
            with opened(path, name) as file:
                actual = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        except OSError as error:
            raise CheckpointError(f"{path / name}: named in the manifest but missing ({error})") from None
        if actual != expected:
            raise CheckpointError(f"{path / name}: its checksum differs from the manifest; the file is corrupt")
    return found
