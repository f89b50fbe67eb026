"""kopf's part: watching. Its events go into the world and the queue; no object is written to, no finalizer is set.

Objects of other kinds than ours are watched by label on the server's side: a large cluster's pods never come here.
"""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
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
    POD,
    SERVICE,
    Kind,
    Manifest,
)
from coserve_operator.resources.metadata import AGENT_APP, APP, FEEDER_APP, MANAGED_BY

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
    DISRUPTION_BUDGET: OURS,
    NETWORK_POLICY: OURS,
}
"""The kinds that are watched, each with the labels asked for."""

OnEvent = Callable[[Kind, str | None, Manifest], None]
"""Called with the kind, the type of the event (ADDED, MODIFIED, DELETED, None from a list) and the object."""


def watch_settings(identity: str) -> kopf.OperatorSettings:
    """Return kopf's settings: no scanning of CRDs and namespaces, no peering, no events of its own."""
    settings = kopf.OperatorSettings()
    settings.scanning.disabled = True
    settings.peering.standalone = True
    settings.posting.enabled = False
    settings.posting.reporting_instance = identity
    settings.watching.server_timeout = 300
    settings.watching.connect_timeout = 10
    settings.networking.request_timeout = 30
    for kind, labels in SELECTORS.items():
        if labels:
            settings.watching.label_selectors[kind.group, kind.version, kind.plural] = labels
    return settings


def registry(on_event: OnEvent) -> kopf.OperatorRegistry:
    """Return the handlers: one for each watched kind, all of them `on_event`."""
    made = kopf.OperatorRegistry()
    kopf.on.login(registry=made)(_login)
    for kind in SELECTORS:
        kopf.on.event(kind.group, kind.version, kind.plural, id=kind.plural, registry=made)(_handler(kind, on_event))
    return made


async def watch(on_event: OnEvent, identity: str, exit_s: float = 10.0) -> None:
    """Watch until cancelled; `on_event` is called in this loop.

    kopf has a thread and an event loop of its own: at its end it waits for every task of its loop, ours included.
    """
    ours, ended = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()
    theirs: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    def hand_over(kind: Kind, type_: str | None, body: Manifest) -> None:
        ours.call_soon_threadsafe(on_event, kind, type_, body)

    async def operate() -> None:
        stop = asyncio.Event()
        theirs.append((asyncio.get_running_loop(), stop))
        handlers, settings = registry(hand_over), watch_settings(identity)
        await kopf.operator(registry=handlers, settings=settings, clusterwide=True, standalone=True, stop_flag=stop)

    def thread() -> None:
        error: BaseException | None = None
        try:
            asyncio.run(operate())
        except Exception as caught:
            error = caught
        with suppress(RuntimeError):  # our loop may be closed already
            ours.call_soon_threadsafe(_resolve, ended, error)

    threading.Thread(target=thread, name="kopf", daemon=True).start()
    try:
        await asyncio.shield(ended)
    finally:
        for loop, stop in theirs:
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(stop.set)
        await asyncio.wait([ended], timeout=exit_s)


def _resolve(future: "asyncio.Future[None]", error: BaseException | None) -> None:
    if not future.done():
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)


def _handler(kind: Kind, on_event: OnEvent) -> Callable[..., Any]:
    async def handle(event: Any, **_: Any) -> None:
        on_event(kind, event["type"], dict(event["object"]))

    return handle


def _login(**arguments: Any) -> kopf.ConnectionInfo | None:
    return kopf.login_with_service_account(**arguments) or kopf.login_with_kubeconfig(**arguments)
