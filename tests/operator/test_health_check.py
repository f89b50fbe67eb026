"""The health check that docs/custom-resources.md gives for Argo CD, run by the Lua that is in Redis."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from coserve_api.conditions import condition
from coserve_contract.connect import command

DOCS = Path(__file__).parents[2] / "docs" / "custom-resources.md"


def body(make: Any, seen: int = 1, **conditions: bool) -> dict[str, Any]:
    made = [
        condition(name, so, "Because", "of it", generation=1, now=make.NOW).to_dict() for name, so in conditions.items()
    ]
    return {"metadata": {"generation": 1}, "status": {"observedGeneration": seen, "conditions": made}}


@pytest.mark.parametrize(
    ("seen", "conditions", "health", "message"),
    [
        (1, {"Ready": True, "Reconciling": False, "Stalled": False}, "Healthy", ""),
        (1, {"Ready": False, "Reconciling": False, "Stalled": True}, "Degraded", "Because: of it"),
        (1, {"Ready": False, "Reconciling": True, "Stalled": False}, "Progressing", ""),
        (0, {"Ready": True, "Reconciling": False, "Stalled": False}, "Progressing", ""),
        (1, {"Suspended": True, "Stalled": False, "Reconciling": False}, "Suspended", "of it"),
        (1, {"Suspended": False, "Finished": True, "Stalled": False, "Reconciling": False}, "Healthy", ""),
    ],
)
async def test_the_health_check_of_the_docs(
    redis: Redis, make: Any, seen: int, conditions: dict[str, bool], health: str, message: str
) -> None:
    (check,) = re.findall(r"```lua\n(.*?)```", DOCS.read_text(), re.DOTALL)
    script = f"local obj = cjson.decode(ARGV[1])\nlocal check = function()\n{check}\nend\nreturn cjson.encode(check())"
    answer = await command(redis, "EVAL", script, 0, json.dumps(body(make, seen, **conditions)))
    assert json.loads(answer) == {"status": health, "message": message}
