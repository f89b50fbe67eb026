"""kopf's part: the process's loop, and watching. Its events go into the cache and the queue; no object is written to,
no finalizer is set.

Objects of other kinds than ours are watched by label on the server's side: a large cluster's pods never come here.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import kopf

from coserve_operator.kube import (
    AUTOSCALER,
    BATCH_JOB,
    DEPLOYMENT,
    DISRUPTION_BUDGET,
    ENDPOINT,
    FINETUNE_JOB,
    NETWORK_POLICY,
    PAGE,
    POD,
    SERVICE,
    SERVICE_ACCOUNT,
    Kind,
    Manifest,
)
from coserve_operator.manifests.metadata import AGENT_APP, APP, FEEDER_APP, MANAGED_BY

OURS = ",".join(f"{key}={value}" for key, value in MANAGED_BY.items())
PODS = f"{APP} in ({AGENT_APP},{FEEDER_APP})"
SELECTORS: dict[Kind, str] = {
    ENDPOINT: "",
    FINETUNE_JOB: "",
    POD: PODS,
    DEPLOYMENT: OURS,
    BATCH_JOB: OURS,
    AUTOSCALER: OURS,
    SERVICE: OURS,
    SERVICE_ACCOUNT: OURS,
    DISRUPTION_BUDGET: OURS,
    NETWORK_POLICY: OURS,
}
"""The kinds that are watched, each with the labels asked for."""

OnEvent = Callable[[Kind, str | None, Manifest], None]
"""Called with the kind, the type of the event (ADDED, MODIFIED, DELETED, None from a list) and the object."""
Activity = Callable[[], Awaitable[None]]


class _NoDiffs(kopf.DiffBaseStorage):
    """kopf copies each object, twice, to compare it with what it was: handlers of events have no use for that."""

    def build(self, **_: Any) -> Any:
        return {}

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        pass


class _NoProgress(kopf.ProgressStorage):
    """Nor does it remember anything of them."""

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        pass

    def purge(self, **_: Any) -> None:
        pass

    def touch(self, **_: Any) -> None:
        pass

    def clear(self, *, essence: Any) -> Any:
        return essence


def watch_settings(identity: str) -> kopf.OperatorSettings:
    """Return kopf's settings: no scanning of CRDs and namespaces, no peering, no events of its own."""
    settings = kopf.OperatorSettings()
    settings.scanning.disabled = True
    settings.peering.standalone = True
    settings.posting.enabled = False
    settings.posting.reporting_instance = identity
    settings.watching.server_timeout = 300
    settings.watching.connect_timeout = 10
    settings.watching.chunk_size = PAGE
    settings.networking.request_timeout = 30
    settings.persistence.diffbase_storage, settings.persistence.progress_storage = _NoDiffs(), _NoProgress()
    for kind, labels in SELECTORS.items():
        if labels:
            settings.watching.label_selectors[kind.group, kind.version, kind.plural] = labels
    return settings


def registry(on_event: OnEvent, start: Activity, end: Activity) -> kopf.OperatorRegistry:
    """Return the handlers: one for each watched kind, all of them `on_event`; nothing is watched before `start` is
    over.
    """
    made = kopf.OperatorRegistry()
    kopf.on.login(registry=made)(_login)
    kopf.on.startup(registry=made, id="start", errors=kopf.ErrorsMode.PERMANENT)(_activity(start))
    kopf.on.cleanup(registry=made, id="end", errors=kopf.ErrorsMode.PERMANENT)(_activity(end))
    for kind in SELECTORS:
        kopf.on.event(kind.group, kind.version, kind.plural, id=kind.plural, registry=made)(_handler(kind, on_event))
    return made


async def operate(handlers: kopf.OperatorRegistry, identity: str, stop: asyncio.Event) -> None:
    """Run until a signal comes or `stop` is set. Tasks that are begun meanwhile are to be over when `end` is."""
    settings = watch_settings(identity)
    await kopf.operator(registry=handlers, settings=settings, clusterwide=True, standalone=True, stop_flag=stop)


def _activity(activity: Activity) -> Callable[..., Any]:
    async def run(**_: Any) -> None:
        await activity()

    return run


def _handler(kind: Kind, on_event: OnEvent) -> Callable[..., Any]:
    async def handle(event: Any, **_: Any) -> None:
        on_event(kind, event["type"], dict(event["object"]))

    return handle


def _login(**arguments: Any) -> kopf.ConnectionInfo | None:
    return kopf.login_with_service_account(**arguments) or kopf.login_with_kubeconfig(**arguments)
