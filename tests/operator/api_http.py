"""Plain HTTP to a test's API server, for what kubectl is too slow for: an administrator's clients."""

from __future__ import annotations

import ssl
from typing import Any

import httpx
import yaml

MERGE = {"Content-Type": "application/merge-patch+json"}


def _settings(api_server: Any) -> dict[str, Any]:
    config = yaml.safe_load(api_server.kubeconfig.read_text())
    server, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
    trust = ssl.create_default_context(cafile=server["certificate-authority"])
    headers = {"Authorization": f"Bearer {user['token']}"}
    return {"base_url": server["server"], "headers": headers, "verify": trust, "timeout": 30}


def client(api_server: Any) -> httpx.Client:
    """One that waits for its answers."""
    return httpx.Client(**_settings(api_server))


def async_client(api_server: Any) -> httpx.AsyncClient:
    """One of an event loop."""
    return httpx.AsyncClient(**_settings(api_server))
