"""Jobs over HTTP, on a server that has nothing but a directory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from agent_programs import Programs

LONG = 150
"""Steps of a job that is met while it runs."""


def test_a_job_becomes_an_adapter_that_answers(jobs: Any, trains: Any, state: Path) -> None:
    made = jobs.create("first")
    assert (made["name"], made["state"], made["adapter"], made["step"]) == ("first", "Queued", None, 0)
    events = jobs.events("first")
    steps = [one for one in events if one["type"] == "step"]
    assert [one["step"] for one in steps] == list(range(1, 25))
    assert all(one["loss"] > 0 and one["tokens"] > 0 for one in steps)
    assert [one["step"] for one in events if one["type"] == "evaluation"] == [0, 24]
    states = [one["state"] for one in events if one["type"] == "state"]
    assert states[-1] == "Completed"
    assert "Running" in states
    job = jobs.get("first")
    assert (job["state"], job["step"], job["total_steps"], job["eta_seconds"]) == ("Completed", 24, 24, None)
    assert job["eval_loss"] < job["eval_loss_initial"]
    assert job["data"]["samples"] + job["data"]["eval_samples"] == 60
    path = state / "artifacts/adapters/local/tuned/v1"
    assert job["adapter"] == {"name": "tuned", "version": 1, "path": str(path)}
    with openai.OpenAI(base_url=f"{trains.url}/v1", api_key="none", max_retries=0) as client:
        asked: dict[str, Any] = {"prompt": "one two 3", "max_tokens": 8, "temperature": 0}
        tuned = client.completions.create(model="tuned", **asked).choices[0].text
        assert "three" in tuned, "it answers as soon as the job is complete"
        assert tuned != client.completions.create(model="base", **asked).choices[0].text
    later = jobs.events("first", after=22)
    assert [(one["type"], one["step"]) for one in later] == [
        ("step", 23),
        ("step", 24),
        ("evaluation", 24),
        ("state", 24),
    ]
    assert [one["name"] for one in jobs.http.get("/v1/finetune_jobs").json()["data"]] == ["first"]


def test_a_job_is_suspended_resumed_and_comes_to_the_same_adapter(jobs: Any) -> None:
    jobs.create("straight", adapter="straight", training={"maxSteps": LONG})
    jobs.create("halting", adapter="halting", training={"maxSteps": LONG}, priority=-1)
    assert jobs.get("halting")["state"] in ("Queued", "Preparing")
    assert jobs.over("straight")["state"] == "Completed"
    jobs.until("halting", lambda job: job["step"] >= 3)
    jobs.post("halting", "suspend")
    held = jobs.until("halting", lambda job: job["state"] == "Suspended")
    assert 0 < held["checkpoint"]["step"] < LONG
    jobs.post("halting", "resume")
    assert jobs.over("halting")["state"] == "Completed"
    assert weights(jobs, "halting") == weights(jobs, "straight")


def weights(jobs: Any, name: str) -> str:
    manifest = json.loads((Path(jobs.get(name)["adapter"]["path"]) / "manifest.json").read_text())
    return str(manifest["files"]["adapter_model.safetensors"]["sha256"])


def test_a_cancelled_job_leaves_nothing_once_it_is_deleted(jobs: Any, state: Path) -> None:
    uid = jobs.create("stopped", adapter="stopped", training={"maxSteps": 5000})["uid"]
    jobs.until("stopped", lambda job: job["checkpoint"] is not None)
    assert (state / "artifacts/jobs" / uid).is_dir()
    jobs.post("stopped", "cancel")
    assert jobs.over("stopped")["state"] == "Cancelled"
    assert jobs.events("stopped")[-1]["state"] == "Cancelled"
    refused = jobs.http.post("/v1/finetune_jobs/stopped/suspend")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "job_over")
    assert jobs.http.delete("/v1/finetune_jobs/stopped").json()["deleted"] is True
    assert jobs.http.get("/v1/finetune_jobs/stopped").status_code == 404
    assert not (state / "artifacts/jobs" / uid).exists()


def test_a_job_that_runs_is_cancelled_by_its_deletion(jobs: Any) -> None:
    jobs.create("gone", adapter="gone", training={"maxSteps": 5000})
    jobs.until("gone", lambda job: job["state"] == "Running")
    assert jobs.http.delete("/v1/finetune_jobs/gone").json()["deleted"] is True
    jobs.create("gone", adapter="gone", training={"maxSteps": 3})
    assert jobs.over("gone")["state"] == "Completed"


def test_a_line_that_cannot_be_used_fails_the_job_and_names_it(jobs: Any, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "one", "completion": " two"}\n{"prompt": 1}\n')
    jobs.create("bad", dataset={"uri": str(bad)})
    job = jobs.over("bad")
    assert (job["state"], job["reason"]) == ("Failed", "InvalidDataset")
    assert "line 2" in job["message"]
    jobs.create("none", dataset={"uri": f"file://{tmp_path}/none.jsonl"})
    assert jobs.over("none")["reason"] == "DatasetNotFound"


def test_a_feeder_that_is_killed_is_started_again(jobs: Any) -> None:
    uid = jobs.create("fed", adapter="fed", training={"maxSteps": LONG})["uid"]
    jobs.until("fed", lambda job: job["step"] > 0)
    (pid,) = feeders(uid)
    os.kill(pid, 9)
    assert jobs.over("fed")["step"] == LONG
    assert jobs.get("fed")["restarts"] == 0


def feeders(uid: str) -> list[int]:
    """The feeders of a job, by their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and f"COSERVE_JOB_UID={uid}".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [("", 404, "job_not_found"), ("/events", 404, "job_not_found"), ("/events?after=x", 400, "invalid_value")],
)
def test_what_there_is_not_is_said(jobs: Any, path: str, status: int, code: str) -> None:
    answer = jobs.http.get(f"/v1/finetune_jobs/nobody{path}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_a_server_without_a_directory_says_where_jobs_come_from(served: Any) -> None:
    with httpx.Client(base_url=served.url) as http:
        for method, path in (("POST", ""), ("GET", ""), ("GET", "/x"), ("DELETE", "/x"), ("POST", "/x/cancel")):
            answer = http.request(method, f"/v1/finetune_jobs{path}")
            assert answer.status_code == 501
            assert "start it with COSERVE_STATE" in answer.json()["error"]["message"]


def test_a_second_server_is_refused(trains: Any, state: Path, programs: Programs, variables: dict[str, object]) -> None:
    second = programs.start("main", **variables | {"state": state})
    assert second.process.wait(60) == 1
    assert f"the server with process id {os.getpid()} has" in second.log


def test_a_directory_and_redis_at_once_are_refused(programs: Programs, variables: dict[str, object]) -> None:
    both = programs.start("main", **variables | {"state": "/nowhere", "redis_url": "redis://127.0.0.1:1/0"})
    assert both.process.wait(60) == 1
    assert "COSERVE_STATE is '/nowhere' and COSERVE_REDIS_URL is set" in both.log
