"""Adapters that are named at the start or loaded by a request, as in vLLM."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from peft_adapters import publish

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """PEFT's folders one, two and three, below it."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("one", "two", "three")):
        made = publish(root, model_folder, name, seed=seed)
        (root / made.path).rename(root / name)
        (root / name / "manifest.json").unlink()
    return root


@pytest.fixture(scope="module")
def agent(start_agent: Callable[..., Any], folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    state = tmp_path_factory.mktemp("state")
    return start_agent(state=state, adapter_dir=folder, adapters={"org/first": folder / "one"})


@pytest.fixture
def http(agent: Any) -> Any:
    with httpx.Client(base_url=agent.url, timeout=60) as client:
        yield client
        for model in client.get("/v1/models").json()["data"]:
            if model["parent"] and model["id"] != "org/first":
                client.post(UNLOAD, json={"lora_name": model["id"]})


def load(http: httpx.Client, name: str, path: str, **more: Any) -> httpx.Response:
    return http.post(LOAD, json={"lora_name": name, "lora_path": path, **more})


def answer(http: httpx.Client, model: str) -> httpx.Response:
    body = {"model": model, "prompt": "one two", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    return http.post("/v1/completions", json=body)


def text(http: httpx.Client, model: str) -> str:
    found = answer(http, model)
    assert found.status_code == 200, found.text
    return str(found.json()["choices"][0]["text"])


def listed(http: httpx.Client) -> list[str]:
    return [one["id"] for one in http.get("/v1/models").json()["data"]]


def test_one_named_at_the_start_is_there_when_the_server_is_ready(agent: Any, http: httpx.Client) -> None:
    assert listed(http) == ["base", "org/first"]
    assert text(http, "org/first") != text(http, "base")
    assert load(http, "same", "one").status_code == 200
    assert text(http, "same") == text(http, "org/first")


def test_an_adapter_comes_goes_and_leaves_nothing(agent: Any, http: httpx.Client, folder: Path) -> None:
    store = agent.agent.settings.artifact_store / "loaded"
    before = sorted(store.iterdir())
    assert load(http, "sql", "two").json()["version"] == 1
    assert load(http, "sql", str(folder / "two")).json()["error"]["code"] == "already_loaded"
    first = text(http, "sql")
    assert load(http, "sql", "three", load_inplace=True).json()["version"] == 2
    assert text(http, "sql") != first
    assert len(sorted(store.iterdir())) == len(before) + 1, "the copy before is gone"
    assert http.post(UNLOAD, json={"lora_name": "sql"}).status_code == 200
    gone = answer(http, "sql")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")
    assert sorted(store.iterdir()) == before
    assert http.post(UNLOAD, json={"lora_name": "sql"}).status_code == 404
    assert load(http, "sql", "two").json()["version"] == 3, "a number is never another version"
    assert text(http, "sql") == first


def test_what_is_served_does_not_change_with_the_folder(http: httpx.Client, folder: Path) -> None:
    shutil.copytree(folder / "two", folder / "changing")
    load(http, "kept", "changing")
    first = text(http, "kept")
    shutil.rmtree(folder / "changing")
    shutil.copytree(folder / "three", folder / "changing")
    assert text(http, "kept") == first
    load(http, "kept", "changing", load_inplace=True)
    assert text(http, "kept") != first
    shutil.rmtree(folder / "changing")


@pytest.mark.parametrize("path", ["../secret", "/etc", "nowhere", "link", "", ".", "one/../../secret", "a\0b", "~"])
def test_a_path_that_leads_out_is_refused_and_tells_nothing(http: httpx.Client, folder: Path, path: str) -> None:
    secret = folder.parent / "secret"
    if not secret.exists():
        shutil.copytree(folder / "two", secret)
        (folder / "link").symlink_to(secret)
    refused = load(http, "out", path)
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert error["param"] == "lora_path"
    assert str(folder) not in error["message"].replace(path, "") or path in (".", "")
    assert "out" not in listed(http)


def test_a_broken_adapter_is_a_400_that_says_why_and_changes_nothing(http: httpx.Client, folder: Path) -> None:
    broken = folder / "broken"
    shutil.copytree(folder / "two", broken)
    (broken / "adapter_model.safetensors").write_bytes(b"x" * 100)
    assert load(http, "good", "two").status_code == 200
    first = text(http, "good")
    refused = load(http, "good", "broken", load_inplace=True)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_adapter")
    assert "adapter_model.safetensors" in refused.json()["error"]["message"]
    assert "loaded/" not in refused.text
    assert text(http, "good") == first
    (broken / "adapter_config.json").write_text("{")
    assert "adapter_config.json" in load(http, "bad", "broken").json()["error"]["message"]
    assert "bad" not in listed(http)
    shutil.rmtree(broken)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"lora_name": "a b", "lora_path": "one"}, "lora_name"),
        ({"lora_name": "", "lora_path": "one"}, "lora_name"),
        ({"lora_name": "x@live", "lora_path": "one"}, "lora_name"),
        ({"lora_name": "base", "lora_path": "one"}, "lora_name"),
        ({"lora_name": "x", "lora_path": 3}, "lora_path"),
        ({"lora_name": "x"}, "lora_path"),
        ({"lora_name": "x", "lora_path": "one", "lora_int_id": 3}, "lora_int_id"),
    ],
)
def test_a_wrong_body_names_the_field(http: httpx.Client, body: dict[str, Any], param: str) -> None:
    refused = http.post(LOAD, json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param), refused.text


def test_without_a_folder_to_load_from_none_is_loaded(start_agent: Callable[..., Any], tmp_path: Path) -> None:
    agent = start_agent(state=tmp_path / "state")
    with httpx.Client(base_url=agent.url, timeout=60) as http:
        refused = load(http, "x", "/etc")
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "not_allowed")
        assert "--adapter-dir" in refused.text


def test_a_server_without_a_directory_says_so(served: Any) -> None:
    refused = httpx.post(f"{served.url}{LOAD}", json={"lora_name": "x", "lora_path": "y"})
    assert refused.status_code == 501
    assert "COSERVE_STATE" in refused.json()["error"]["message"]


def test_names_of_jobs_and_of_loaded_adapters_are_apart(http: httpx.Client, rows: Path, job_client: Any) -> None:
    jobs = job_client(http, rows)
    assert load(http, "taken", "two").status_code == 200
    refused = http.post("/v1/finetune_jobs", json={"spec": jobs.spec(adapter="taken")})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "name_taken")
    jobs.create("waits", adapter="trained", suspend=True)
    refused = load(http, "trained", "two")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "name_taken")
    assert "waits" in refused.text
    assert http.delete("/v1/finetune_jobs/waits").status_code == 200
    assert load(http, "trained", "two").status_code == 200


def test_under_load_a_name_is_one_version_or_the_next_and_never_another(agent: Any, http: httpx.Client) -> None:
    """50 requests a second for a name that is reloaded all the while; each prompt is in the prefix cache of the version
    before.
    """
    load(http, "x", "two")
    expected = {"two": text(http, "x")}
    load(http, "x", "three", load_inplace=True)
    expected["three"] = text(http, "x")
    assert len(set(expected.values())) == 2
    now = ["three"]
    """What the name may stand for: while it is reloaded, one of both."""
    wrong: list[str] = []
    over = threading.Event()

    def client(number: int) -> None:
        with httpx.Client(base_url=agent.url, timeout=60) as mine:
            while not over.is_set():
                begun = time.monotonic()
                before = list(now)
                found = answer(mine, "x")
                allowed = {expected[each] for each in (*before, *now)}
                if found.status_code != 200 or found.json()["choices"][0]["text"] not in allowed:
                    wrong.append(found.text)
                time.sleep(max(0.0, 0.2 - (time.monotonic() - begun)))

    clients = [threading.Thread(target=client, args=(n,)) for n in range(10)]
    for each in clients:
        each.start()
    versions = []
    for turn in range(20):
        path = ("two", "three")[turn % 2]
        now.append(path)
        loaded = load(http, "x", path, load_inplace=True)
        assert loaded.status_code == 200, loaded.text
        versions.append(loaded.json()["version"])
        assert text(http, "x") == expected[path], "the version before is never met again"
        now[:] = [path]
    over.set()
    for each in clients:
        each.join()
    assert wrong == []
    assert versions == list(range(3, 23))
