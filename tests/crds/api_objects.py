"""The example objects on a real API server, and words for what tests do with them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
EXAMPLES = {name: yaml.safe_load((ROOT / "examples" / f"{name}.yaml").read_text()) for name in ("endpoint", "job")}


def get(api, what: str, *more: str) -> dict[str, Any]:
    done = api.kubectl("get", what, "-o", "json", *more)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def patch(api, what: str, body: dict[str, Any], *more: str) -> str:
    """Merge-patch an object; what kubectl said if it was refused."""
    return api.kubectl("patch", what, "--type=merge", "-p", json.dumps(body), *more).stderr


def with_value(body: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of `body` with one field set, or removed where the value is None."""
    body = copy.deepcopy(body)
    *parents, last = path.split(".")
    place = body
    for name in parents:
        place = place.setdefault(name, {})
    if value is None:
        del place[last]
    else:
        place[last] = value
    return body
