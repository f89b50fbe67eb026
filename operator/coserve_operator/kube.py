"""The API server as the operator needs it: plain dicts in and out, server-side apply, and errors by what they mean."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from kubernetes.aio import config
from kubernetes.aio.client import ApiClient, Configuration

Manifest = dict[str, Any]

FIELD_MANAGER = "coserve-operator"
PAGE = 500
"""Objects of a list that are asked for at once."""
PATIENCE = 4
"""How often a call is made that the API server puts off."""
TOO_MANY, LONGEST_WAIT_S = 429, 10.0


class KubeError(Exception):
    """The API server refused or could not be asked; `status` is the HTTP status, 0 when there was none."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}" if status else message)
        self.status = status
        self.message = message


class NotFoundError(KubeError):
    """404: the object, or its namespace, is gone."""


class ConflictError(KubeError):
    """409: it exists already, or a newer version of it does."""


class InvalidError(KubeError):
    """The request is refused, by a validation, a quota, a policy, a webhook (4xx, and 500 with the API server's own
    words): asking again will not help until somebody changes something.
    """


class UnavailableError(KubeError):
    """The API server could not be reached or is overloaded (429, 502 to 504): worth trying again."""


@dataclass(frozen=True)
class Kind:
    """How a kind is addressed."""

    group: str
    version: str
    plural: str
    name: str

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, namespace: str | None, name: str | None = None, subresource: str | None = None) -> str:
        """Return the URL path of the collection, an object or a subresource."""
        parts = ["/apis", self.group, self.version] if self.group else ["/api", self.version]
        if namespace is not None:
            parts += ["namespaces", namespace]
        parts += [part for part in (self.plural, name, subresource) if part is not None]
        return "/".join(parts)


ENDPOINT = Kind("coserve.dev", "v1alpha1", "inferenceendpoints", "InferenceEndpoint")
FINETUNE_JOB = Kind("coserve.dev", "v1alpha1", "finetunejobs", "FinetuneJob")
DEPLOYMENT = Kind("apps", "v1", "deployments", "Deployment")
SERVICE = Kind("", "v1", "services", "Service")
SERVICE_ACCOUNT = Kind("", "v1", "serviceaccounts", "ServiceAccount")
SECRET = Kind("", "v1", "secrets", "Secret")
POD = Kind("", "v1", "pods", "Pod")
EVENT = Kind("", "v1", "events", "Event")
CONFIG_MAP = Kind("", "v1", "configmaps", "ConfigMap")
BATCH_JOB = Kind("batch", "v1", "jobs", "Job")
DISRUPTION_BUDGET = Kind("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget")
AUTOSCALER = Kind("autoscaling", "v2", "horizontalpodautoscalers", "HorizontalPodAutoscaler")
NETWORK_POLICY = Kind("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy")
LEASE = Kind("coordination.k8s.io", "v1", "leases", "Lease")
CLUSTER_ROLE = Kind("rbac.authorization.k8s.io", "v1", "clusterroles", "ClusterRole")
API_SERVICE = Kind("apiregistration.k8s.io", "v1", "apiservices", "APIService")

KINDS = {
    kind.name: kind
    for kind in (
        ENDPOINT, FINETUNE_JOB, DEPLOYMENT, SERVICE, SERVICE_ACCOUNT, SECRET, POD, EVENT, CONFIG_MAP, BATCH_JOB,
        DISRUPTION_BUDGET, AUTOSCALER, NETWORK_POLICY, LEASE, API_SERVICE,
    )
}  # fmt: skip


async def connect() -> "Kube":
    """Return a client: of the pod's service account where there is one, else of KUBECONFIG."""
    configuration = Configuration()
    if _in_pod():
        config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
    else:
        await config.load_kube_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
    return Kube(ApiClient(configuration))


def _in_pod() -> bool:
    return Path("/var/run/secrets/kubernetes.io/serviceaccount/token").exists()


class Kube:
    """A thin asynchronous client. Every call has a timeout; errors are of KubeError's tree."""

    def __init__(
        self, client: ApiClient, timeout_s: float = 15.0, before_write: Callable[[], object] = lambda: None
    ) -> None:
        self._client = client
        self._timeout_s = timeout_s
        self._before_write = before_write

    def guarded(self, before_write: Callable[[], object]) -> "Kube":
        """Return a client of the same connections that asks before each write, and writes nothing if that raises."""
        return Kube(self._client, self._timeout_s, before_write)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()  # type: ignore[no-untyped-call]

    async def get(self, kind: Kind, namespace: str | None, name: str) -> Manifest:
        """Read one object."""
        return await self._call("GET", kind.path(namespace, name))

    async def list_all(self, kind: Kind, labels: str = "") -> tuple[list[Manifest], int]:
        """Read all objects of the cluster as they are now; return them and the resourceVersion of the list."""
        found, version = list[Manifest](), 0
        async for page, as_of in self.pages(kind, labels):
            found, version = found + page, as_of
        return found, version

    async def pages(self, kind: Kind, labels: str = "") -> AsyncIterator[tuple[list[Manifest], int]]:
        """Read them page by page, so that not all of them are held at once."""
        labelled = [("labelSelector", labels)] if labels else []
        more = ""
        while True:
            page = [("limit", str(PAGE)), *([("continue", more)] if more else [])]
            answer = await self._call("GET", kind.path(None), query=[*labelled, *page])
            yield answer.get("items") or [], int(answer.get("metadata", {}).get("resourceVersion") or 0)
            more = answer.get("metadata", {}).get("continue") or ""
            if not more:
                return

    async def missing(self, *kinds: Kind) -> list[str]:
        """Return the kinds that discovery does not name, as PLURAL.GROUP: their CRDs are not there yet."""
        served: set[tuple[str, str, str]] = set()
        groups = {each["name"] for each in (await self._call("GET", "/apis")).get("groups") or []}
        for group, version in {(kind.group, kind.version) for kind in kinds if kind.group in groups}:
            found = (await self._call("GET", f"/apis/{group}/{version}")).get("resources") or []
            served |= {(group, version, each["name"]) for each in found}
        return [
            f"{each.plural}.{each.group}" for each in kinds if (each.group, each.version, each.plural) not in served
        ]

    async def events_of(self, namespace: str, uid: str) -> list[Manifest]:
        """Return the events about one object, oldest first."""
        query = [("fieldSelector", f"involvedObject.uid={uid}"), ("limit", str(PAGE))]
        found = (await self._call("GET", EVENT.path(namespace), query=query)).get("items") or []
        return sorted(found, key=lambda each: int(each["metadata"]["resourceVersion"]))

    async def create(self, manifest: Manifest) -> Manifest:
        """Create; ConflictError when it exists."""
        kind, namespace, _ = _address(manifest)
        return await self._call("POST", kind.path(namespace), manifest, query=[("fieldManager", FIELD_MANAGER)])

    async def apply(
        self, manifest: Manifest, subresource: str | None = None, manager: str = FIELD_MANAGER, force: bool = True
    ) -> Manifest:
        """Server-side apply: our fields become exactly the manifest's; everybody else's stay. Without `force`,
        ConflictError where another manager has one of them.
        """
        kind, namespace, name = _address(manifest)
        query = [("fieldManager", manager), ("force", str(force).lower())]
        path = kind.path(namespace, name, subresource)
        return await self._call("PATCH", path, manifest, "application/apply-patch+yaml", query)

    async def merge(self, kind: Kind, namespace: str, name: str, patch: Manifest) -> Manifest:
        """Merge-patch single fields."""
        path = kind.path(namespace, name)
        return await self._call("PATCH", path, patch, "application/merge-patch+json", [("fieldManager", FIELD_MANAGER)])

    async def replace(self, manifest: Manifest) -> Manifest:
        """Replace; ConflictError when the resourceVersion in it is not the newest."""
        kind, namespace, name = _address(manifest)
        return await self._call("PUT", kind.path(namespace, name), manifest)

    async def replace_status(self, kind: Kind, namespace: str, name: str, version: str, status: Manifest) -> Manifest:
        """Put `status` in the place of the whole one, whoever wrote that; ConflictError when the object is not of this
        resourceVersion any more.
        """
        patch: list[Manifest] = [
            {"op": "replace", "path": "/metadata/resourceVersion", "value": version},
            {"op": "add", "path": "/status", "value": status},
        ]
        path, query = kind.path(namespace, name, "status"), [("fieldManager", FIELD_MANAGER)]
        return await self._call("PATCH", path, patch, "application/json-patch+json", query)

    async def delete(
        self, kind: Kind, namespace: str | None, name: str, uid: str | None = None, version: str | None = None
    ) -> None:
        """Delete with what it owns; only the object with this uid, and as it was in that resourceVersion, if given.
        Gone already, or changed, is fine.
        """
        body: Manifest = {"propagationPolicy": "Background"}
        if uid is not None:
            body["preconditions"] = {"uid": uid, **({"resourceVersion": version} if version else {})}
        try:
            await self._call("DELETE", kind.path(namespace, name), body)
        except (NotFoundError, ConflictError):
            return

    async def _call(
        self,
        method: str,
        path: str,
        body: Manifest | list[Manifest] | None = None,
        content_type: str = "application/json",
        query: list[tuple[str, str]] | None = None,
    ) -> Manifest:
        """Call until it is not put off (429, in the seconds that the API server asks for) any more."""
        for left in reversed(range(PATIENCE)):
            if method != "GET":
                self._before_write()
            status, answer, retry_after_s = await self._call_once(method, path, body, content_type, query or [])
            if status != TOO_MANY or not left:
                break
            await asyncio.sleep(min(LONGEST_WAIT_S, retry_after_s) * random.uniform(1.0, 1.5))
        if status < 300:
            return answer
        in_words = answer.get("kind") == "Status"
        raise _error_type(status, in_words)(status, f"{method} {path}: {answer.get('message', '')}")

    async def _call_once(
        self,
        method: str,
        path: str,
        body: Manifest | list[Manifest] | None,
        content_type: str,
        query: list[tuple[str, str]],
    ) -> tuple[int, Manifest, float]:
        """Return HTTP status, the answer, and after how many seconds to ask again."""
        headers = {"Content-Type": content_type, "Accept": "application/json"}
        try:
            request = await self._client.param_serialize(
                method, path, query_params=query, header_params=headers, body=body, auth_settings=["BearerToken"]
            )
            _, url, sent, payload, _ = request
            timeout = aiohttp.ClientTimeout(total=self._timeout_s)
            response = await self._client.rest_client.request(  # type: ignore[no-untyped-call]
                method, url, headers=sent, body=payload, _request_timeout=timeout
            )
            data = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise UnavailableError(0, f"{method} {path}: {error or type(error).__name__}") from error
        parsed: Manifest = _parsed(data)
        if response.status >= 300 and not parsed.get("message"):
            parsed["message"] = response.reason or ""
        after = response.headers.get("Retry-After", "")
        return response.status, parsed, float(after) if after.isdecimal() else 1.0


def _address(manifest: Manifest) -> tuple[Kind, str | None, str]:
    metadata = manifest["metadata"]
    return KINDS[manifest["kind"]], metadata.get("namespace"), metadata["name"]


def _parsed(data: bytes) -> Manifest:
    try:
        parsed = json.loads(data)
    except ValueError:
        return {"message": data[:200].decode(errors="replace")}
    return parsed if isinstance(parsed, dict) else {}


def _error_type(status: int, in_words: bool) -> type[KubeError]:
    known: dict[int, type[KubeError]] = {404: NotFoundError, 409: ConflictError, TOO_MANY: UnavailableError}
    refused = 400 <= status < 500 or (status == 500 and in_words)
    return known.get(status, InvalidError if refused else UnavailableError)
