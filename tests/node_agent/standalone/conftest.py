"""A server that trains by itself, as a thread that its tests share, and its jobs over HTTP."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

JOBS = "/v1/finetune_jobs"
STEPS = 24


@dataclass
class Jobs:
    """A client of the API for jobs. `data` is the path of a data set that can be learned."""

    http: httpx.Client
    data: Path

    def spec(self, adapter: str = "tuned", **parts: Any) -> dict[str, Any]:
        training = {"maxSteps": STEPS, "batchSize": 4, "learningRate": "5e-3", "warmupSteps": 2, "seed": 3}
        return {
            "dataset": {"uri": str(self.data), "evalPercent": 10, "maxSequenceLength": 128},
            "adapter": {"name": adapter, "rank": 4, "alpha": 8},
            "training": training | parts.pop("training", {}),
            "checkpoint": {"everySteps": 5},
            **parts,
        }

    def create(self, name: str, **spec: Any) -> dict[str, Any]:
        answer = self.http.post(JOBS, json={"name": name, "spec": self.spec(**spec)})
        assert answer.status_code == 201, answer.text
        return answer.json()  # type: ignore[no-any-return]

    def get(self, name: str) -> dict[str, Any]:
        answer = self.http.get(f"{JOBS}/{name}")
        assert answer.status_code == 200, answer.text
        return answer.json()  # type: ignore[no-any-return]

    def post(self, name: str, what: str) -> dict[str, Any]:
        answer = self.http.post(f"{JOBS}/{name}/{what}")
        assert answer.status_code == 200, answer.text
        return answer.json()  # type: ignore[no-any-return]

    def until(self, name: str, condition: Callable[[dict[str, Any]], bool], seconds: float = 90) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while not condition(found := self.get(name)):
            assert time.monotonic() < deadline, found
            time.sleep(0.1)
        return found

    def over(self, name: str, seconds: float = 90) -> dict[str, Any]:
        return self.until(name, lambda job: job["finished"] is not None, seconds)

    def events(self, name: str, after: int = -1) -> list[dict[str, Any]]:
        """All of them, until the job is over."""
        with self.http.stream("GET", f"{JOBS}/{name}/events", params={"after": after}) as answer:
            lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"prompt": f"one two {n % 7}", "completion": " three four" * (2 + 4 * (n % 9))} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="session")
def trains(start_agent: Callable[..., Any], state: Path) -> Any:
    """One server of a directory that these tests share."""
    return start_agent(state=state)


@pytest.fixture
def jobs(trains: Any, rows: Path) -> Iterator[Jobs]:
    with httpx.Client(base_url=trains.url, timeout=60) as http:
        yield Jobs(http, rows)


@pytest.fixture(scope="session")
def job_client() -> type[Jobs]:
    """For servers that a test starts itself."""
    return Jobs
