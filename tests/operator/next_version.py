"""A next version of coserve, made of this one: each kind's spec has one more optional field with a default, and each
status one more field, in which that version's operator writes what the spec's says.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEFAULT = "by default"

_SPEC = f'    later: str = "{DEFAULT}"\n    """What this version does not know."""\n'
_STATUS = '    seen_later: str = ""\n    """What stands in the spec."""\n'
_CHANGES = (
    ("crds/coserve_api/job.py", "class JobSpec(SpecModel):\n", _SPEC),
    ("crds/coserve_api/endpoint.py", "class EndpointSpec(SpecModel):\n", _SPEC),
    ("crds/coserve_api/job_status.py", "class JobStatus(StatusModel):\n", _STATUS),
    ("crds/coserve_api/endpoint_status.py", "class EndpointStatus(StatusModel):\n", _STATUS),
    ("operator/coserve_operator/decide/job_status.py", "**old.unknown,\n", "seen_later=observed.job.spec.later,\n"),
    ("operator/coserve_operator/decide/endpoint_status.py", "**old.unknown,\n", "seen_later=endpoint.spec.later,\n"),
)


@dataclass(frozen=True)
class Version:
    """Sources of the operator, and the folder of its CRDs."""

    sources: Path
    crds: Path

    @property
    def python_path(self) -> str:
        return os.pathsep.join(str(self.sources / part) for part in ("crds", "operator"))


THIS = Version(ROOT, ROOT / "crds")


def make_next(folder: Path) -> Version:
    """The next version, in `folder`."""
    for part in ("crds/coserve_api", "crds/coserve_contract", "operator/coserve_operator"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name, before, more in _CHANGES:
        file = folder / name
        text = file.read_text()
        assert text.count(before) == 1, f"{name} has {before!r} {text.count(before)} times: change it here, too"
        file.write_text(text.replace(before, before + more))
    made = Version(folder, folder / "definitions")
    made.crds.mkdir()
    words = [sys.executable, "-m", "coserve_api.generate", str(made.crds)]
    subprocess.run(words, env=os.environ | {"PYTHONPATH": made.python_path}, check=True)
    return made
