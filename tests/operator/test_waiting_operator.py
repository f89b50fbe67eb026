"""An operator whose API server is away: a kubelet that took it for dead would have it begin anew, later each time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import yaml


def kubeconfig(folder: Path, port: int) -> Path:
    """Of a server that is not there."""
    path, name = folder / "kubeconfig", "away"
    config = {
        "current-context": name,
        "clusters": [{"name": name, "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
        "users": [{"name": name, "user": {"token": "t"}}],
    }
    path.write_text(yaml.safe_dump(config))
    return path


def test_it_is_alive_and_not_ready(tmp_path: Path, servers: Any) -> None:
    port, away = servers.free_port(), servers.free_port()
    settings = {"COSERVE_AGENT_IMAGE": "a", "COSERVE_NAMESPACE": "ns", "COSERVE_ACCESS_SECRET": "coserve-access"}
    env = os.environ | settings | {"KUBECONFIG": str(kubeconfig(tmp_path, away)), "COSERVE_HEALTH_PORT": str(port)}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "coserve_operator.main"], env=env, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            while "Secret ns/coserve-access" not in (tmp_path / "log").read_text():
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.1)
            alive, ready = client.get("/healthz"), client.get("/readyz")
    finally:
        process.terminate()
        process.wait(20)
    assert (alive.status_code, ready.status_code) == (200, 503)
    assert ready.text == "it waits for the API server"
