"""Pods as processes of this machine, where there is an API server and no node: what a kubelet does for agents and
feeders, as far as the operator can tell. Volumes are folders, images are this checkout.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
from base64 import b64decode
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from agent_programs import Program, Programs
from api_http import MERGE

NODE = "node-1"
LOOK_EVERY_S = 0.3


@dataclass
class Kubelet:
    """Of one namespace. `volumes` says which folder stands for a path of a container."""

    http: httpx.AsyncClient
    namespace: str
    programs: Programs
    volumes: Mapping[str, Path]

    def __post_init__(self) -> None:
        self._running: dict[str, Program] = {}
        self.by_pod: dict[str, Program] = {}
        """What was started, by the pod's name."""
        self._told: dict[str, dict[str, Any]] = {}

    @property
    def _path(self) -> str:
        return f"/api/v1/namespaces/{self.namespace}"

    async def pods(self) -> list[dict[str, Any]]:
        answer = await self.http.get(f"{self._path}/pods")
        items: list[dict[str, Any]] = answer.raise_for_status().json()["items"]
        return items

    async def run(self) -> None:
        """Until the task is cancelled; whoever started `programs` ends them."""
        while True:
            for pod in await self.pods():
                await self._look_at(pod)
            await asyncio.sleep(LOOK_EVERY_S)

    async def _look_at(self, pod: dict[str, Any]) -> None:
        uid, name = pod["metadata"]["uid"], pod["metadata"]["name"]
        program = self._running.get(uid)
        if "deletionTimestamp" in pod["metadata"]:
            if program is not None and program.process.poll() is None:
                program.process.send_signal(signal.SIGTERM)
            else:
                await self.http.request("DELETE", f"{self._path}/pods/{name}", json={"gracePeriodSeconds": 0})
        elif program is None:
            target = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}, "target": {"name": NODE}}
            bound = await self.http.post(f"{self._path}/pods/{name}/binding", json=target)
            bound.raise_for_status()
            (container,) = pod["spec"]["containers"]
            variables = [await self._variable(pod, each) for each in container["env"]]
            own = {"host": "127.0.0.1", "http_port": 0, "admin_port": 0}
            module = container["command"][-1].removeprefix("coserve_agent.")
            self._running[uid] = self.by_pod[name] = self.programs.start(module, **dict(filter(None, variables)) | own)
        else:
            await self._tell(pod, await self._status(pod, program))

    async def _variable(self, pod: dict[str, Any], variable: dict[str, Any]) -> tuple[str, str] | None:
        """A COSERVE_ variable of a container as `Programs` takes it."""
        if not variable["name"].startswith("COSERVE_"):
            return None
        name, source = variable["name"].removeprefix("COSERVE_").lower(), variable.get("valueFrom", {})
        if "secretKeyRef" in source:
            secret = await self.http.get(f"{self._path}/secrets/{source['secretKeyRef']['name']}")
            return name, b64decode(secret.raise_for_status().json()["data"][source["secretKeyRef"]["key"]]).decode()
        if "fieldRef" in source:
            part, field = source["fieldRef"]["fieldPath"].split(".")
            return name, NODE if field == "nodeName" else str(pod[part][field])
        value = variable.get("value", "").replace("$$", "$")
        for path, folder in self.volumes.items():
            if value == path or value.startswith(f"{path}/"):
                value = f"{folder}{value.removeprefix(path)}"
        return name, value

    async def _status(self, pod: dict[str, Any], program: Program) -> dict[str, Any]:
        (container,) = pod["spec"]["containers"]
        code = program.process.poll()
        ready = code is None and await self._ready(container, program)
        phase = "Running" if code is None else "Failed" if code else "Succeeded"
        state: dict[str, Any] = {"running": {}} if code is None else {"terminated": {"exitCode": code}}
        conditions = {"PodScheduled": True, "Initialized": True, "ContainersReady": ready, "Ready": ready}
        told = {"name": container["name"], "image": container["image"], "imageID": "", "restartCount": 0}
        return {
            "phase": phase,
            "conditions": [{"type": name, "status": str(so)} for name, so in conditions.items()],
            "containerStatuses": [told | {"ready": ready, "started": code is None, "state": state}],
        }

    async def _ready(self, container: dict[str, Any], program: Program) -> bool:
        if "readinessProbe" not in container:
            return True
        port = re.search(r"admin port (\d+)", program.log)
        if port is None:
            return False
        try:
            async with httpx.AsyncClient(timeout=5) as client:
                return (await client.get(f"http://127.0.0.1:{port[1]}/ready")).status_code == 200
        except httpx.TransportError:
            return False

    async def _tell(self, pod: dict[str, Any], status: dict[str, Any]) -> None:
        uid, path = pod["metadata"]["uid"], f"{self._path}/pods/{pod['metadata']['name']}/status"
        if self._told.get(uid) != status:
            answer = await self.http.patch(path, content=json.dumps({"status": status}), headers=MERGE)
            answer.raise_for_status()
            self._told[uid] = status
