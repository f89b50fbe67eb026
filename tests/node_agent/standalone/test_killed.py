"""A server that is killed around any write comes to the same adapter, by its checksum, and tells each step once."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
from agent_programs import Programs, when_ready

SCRIPT = Path(__file__).parents[1] / "kill_points.py"
SEMANTIC = [
    ("bind", "after", 1),
    ("take_lease", "before", 1),
    ("accept_checkpoint", "before", 1),  # the first checkpoint is on the disk, and nobody knows it
    ("accept_checkpoint", "before", 3),
    ("accept_checkpoint", "after", 2),
    ("finish", "before", 1),  # the adapter is on the disk, and nobody knows it
    ("finish", "after", 1),
    ("set_adapters", "before", 1),
    ("set_adapters", "after", 1),
]
EVERY = [("write", when, number) for number in range(3, 21, 3) for when in ("before", "after")]


@pytest.fixture(scope="module")
def expected(trains: Any, rows: Path, job_client: Any) -> str:
    """The checksum of the weights of a job that nobody disturbs."""
    with httpx.Client(base_url=trains.url, timeout=60) as http:
        jobs = job_client(http, rows)
        jobs.create("undisturbed", adapter="undisturbed")
        return weights(jobs.over("undisturbed"))


def weights(job: dict[str, Any]) -> str:
    assert job["state"] == "Completed", job
    manifest = json.loads((Path(job["adapter"]["path"]) / "manifest.json").read_text())
    return str(manifest["files"]["adapter_model.safetensors"]["sha256"])


def check(
    point: tuple[str, str, int], programs: Programs, variables: dict[str, object], jobs_of: Any, expected: str
) -> None:
    name, when, number = point
    doomed = when_ready(programs.run(name, [str(SCRIPT), name, when, str(number)], variables))
    with httpx.Client(base_url=doomed.url, timeout=60) as http:
        try:
            jobs_of(http).create("killed", adapter="undisturbed")
        except httpx.TransportError:
            pytest.fail("killed before the job was taken: it proves nothing")
    assert doomed.program.process.wait(90) == -9, doomed.program.log
    again = when_ready(programs.start("main", **variables))
    with httpx.Client(base_url=again.url, timeout=60) as http:
        jobs = jobs_of(http)
        job = jobs.over("killed")
        assert weights(job) == expected
        events = jobs.events("killed")
        assert [one["step"] for one in events if one["type"] == "step"] == list(range(1, 25))
        listed = [model["id"] for model in http.get("/v1/models").json()["data"]]
        assert "undisturbed" in listed


@pytest.fixture
def killed(programs: Programs, variables: dict[str, object], tmp_path: Path, rows: Path, job_client: Any) -> Any:
    """Run a job on a server that is killed at a point, and on one that goes on."""
    there = variables | {"state": tmp_path / "state", "drain_s": 0}
    return lambda point, expected: check(point, programs, there, lambda http: job_client(http, rows), expected)


def test_a_checkpoint_that_was_written_and_not_accepted(killed: Any, expected: str) -> None:
    killed(("accept_checkpoint", "before", 2), expected)


def test_a_corrupt_checkpoint_falls_back_to_the_one_before(
    programs: Programs, variables: dict[str, object], tmp_path: Path, rows: Path, job_client: Any, expected: str
) -> None:
    there = variables | {"state": tmp_path / "state"}
    point = [str(SCRIPT), "accept_checkpoint", "after", "2"]
    doomed = when_ready(programs.run("doomed", point, there))
    with httpx.Client(base_url=doomed.url, timeout=60) as http:
        uid = job_client(http, rows).create("corrupt", adapter="undisturbed")["uid"]
    assert doomed.program.process.wait(90) == -9, doomed.program.log
    corrupt = tmp_path / "state/artifacts/jobs" / uid / "e1/s10/optimizer.safetensors"
    corrupt.write_bytes(corrupt.read_bytes()[:-1] + b"\x55")
    again = when_ready(programs.start("main", **there))
    with httpx.Client(base_url=again.url, timeout=60) as http:
        assert weights(job_client(http, rows).over("corrupt")) == expected
    assert "going on from the older checkpoint of step 5" in again.program.log


def test_a_server_that_is_told_to_end_gives_its_job_back_and_that_is_no_fault(
    programs: Programs, variables: dict[str, object], tmp_path: Path, rows: Path, job_client: Any
) -> None:
    there = variables | {"state": tmp_path / "state", "drain_s": 0}
    first = when_ready(programs.start("main", **there))
    with httpx.Client(base_url=first.url, timeout=60) as http:
        jobs = job_client(http, rows)
        jobs.create("long", training={"maxSteps": 5000}, checkpoint={"everySteps": 1000})
        jobs.until("long", lambda job: job["step"] > 0)
        with http.stream("GET", "/v1/finetune_jobs/long/events") as answer:
            first.program.process.send_signal(signal.SIGTERM)
            assert '{"type":"draining"}' in answer.read().decode(), "who watches holds nothing up"
    assert first.program.process.wait(60) == 0, first.program.log
    assert "given back at step" in first.program.log
    again = when_ready(programs.start("main", **there))
    with httpx.Client(base_url=again.url, timeout=60) as http:
        job = job_client(http, rows).until("long", lambda job: job["state"] == "Running")
        assert (job["restarts"], job["checkpoint"]["step"] > 0) == (0, True)


@pytest.mark.nightly
@pytest.mark.parametrize("point", SEMANTIC, ids=lambda point: "-".join(map(str, point)))
def test_every_boundary(killed: Any, expected: str, point: tuple[str, str, int]) -> None:
    killed(point, expected)


@pytest.mark.nightly
@pytest.mark.parametrize("point", EVERY, ids=lambda point: "-".join(map(str, point)))
def test_every_write(killed: Any, expected: str, point: tuple[str, str, int]) -> None:
    killed(point, expected)
