"""custom.metrics.k8s.io for endpoints: a small stateless server beside the operator, which it never asks.

It has its own replicas, reads all it needs itself, and registers itself with the API server.
"""

import asyncio
import logging
import ssl
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aiohttp import web
from pydantic_settings import CliApp
from redis.asyncio import Redis
from redis.exceptions import RedisError

from coserve_contract.keys import Keys
from coserve_contract.store import Store
from coserve_operator import kube as kubernetes
from coserve_operator.kube import ENDPOINT, Kube, KubeError, NotFoundError
from coserve_operator.manifests.endpoint import METRIC
from coserve_operator.metrics_api import documents as custom_metrics
from coserve_operator.metrics_api.front_proxy import Trust, load_certificate, read_trust, server_context
from coserve_operator.metrics_api.registration import Registration
from coserve_operator.process import first_of, serving, stop_on_signals
from coserve_operator.redis.bounded import connect_bounded
from coserve_operator.settings import MetricsApiSettings
from coserve_operator.tenants import redis_url
from coserve_operator.tls import NO_TLS, RedisTls, read_tls, until_renewed

logger = logging.getLogger(__name__)

ROOT = f"/apis/{custom_metrics.GROUP_VERSION}"
METRIC_PATH = f"{ROOT}/namespaces/{{namespace}}/{ENDPOINT.plural}.{ENDPOINT.group}/{{name}}/{METRIC}"
TRUST_EVERY_S, CERTIFICATE_EVERY_S = 300.0, 60.0
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Connections:
    """To the Redis of each namespace that was asked for."""

    def __init__(self, settings: MetricsApiSettings, tls: RedisTls = NO_TLS) -> None:
        self._settings, self._tls = settings, tls
        self._made: dict[str, Redis] = {}

    def of(self, namespace: str) -> Redis:
        """Return that of a namespace."""
        url = redis_url(self._settings.redis_url, namespace)
        if url not in self._made:
            username, password = self._settings.redis_username, self._settings.password
            self._made[url] = connect_bounded(url, username, password, self._tls.ca)
        return self._made[url]

    async def aclose(self) -> None:
        """Close all."""
        for redis in self._made.values():
            await redis.aclose()


class TrustChangedError(Exception):
    """The front proxy's CA or names changed: the process must start anew."""


class MetricsApi:
    """The handlers. `now` is the time of day."""

    def __init__(
        self,
        kube: Kube,
        connections: Connections,
        trust: Trust,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._kube, self._connections, self._trust, self._now = kube, connections, trust, now

    def application(self) -> web.Application:
        """Return the HTTP server."""
        application = web.Application(middlewares=[self._guard])
        application.router.add_get("/healthz", self._healthz)
        application.router.add_get(ROOT, self._discovery)
        application.router.add_get(METRIC_PATH, self._metric)
        return application

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Let in the front proxy, and anybody to /healthz; say everything else as a Status."""
        if request.path != "/healthz" and not self._trust.admits(_certificate(request)):
            return _status(403, "Forbidden", "only the API server's front proxy may ask")
        try:
            return await handler(request)
        except web.HTTPNotFound:
            return _status(404, "NotFound", f"there is nothing at {request.path}")
        except (KubeError, RedisError, OSError) as error:
            logger.warning("%s: %s", request.path, error)
            return _status(503, "ServiceUnavailable", f"{error}")

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def _discovery(self, _: web.Request) -> web.Response:
        return web.json_response(custom_metrics.discovery())

    async def _metric(self, request: web.Request) -> web.Response:
        namespace, name = request.match_info["namespace"], request.match_info["name"]
        try:
            endpoint = await self._kube.get(ENDPOINT, namespace, name)
        except NotFoundError:
            return _status(404, "NotFound", f"there is no InferenceEndpoint {name} in namespace {namespace}")
        redis = self._connections.of(namespace)
        fleet = await Store(redis, Keys(endpoint["metadata"]["uid"])).fleet()
        percent = custom_metrics.saturation_percent(fleet.agents.values())
        if percent is None:
            return _status(404, "NotFound", f"no ready agent of InferenceEndpoint {name} has reported {METRIC}")
        return web.json_response(custom_metrics.value_list(namespace, name, percent, self._now()))


def _certificate(request: web.Request) -> dict[str, Any] | None:
    return None if request.transport is None else request.transport.get_extra_info("peercert")


def _status(code: int, reason: str, message: str) -> web.Response:
    return web.json_response(custom_metrics.failure(code, reason, message), status=code)


async def _watch_trust(kube: Kube, trust: Trust) -> None:
    while True:
        await asyncio.sleep(TRUST_EVERY_S)
        try:
            if await read_trust(kube) != trust:
                raise TrustChangedError("the front proxy's CA has changed: starting anew with it")
        except KubeError as error:
            logger.warning("%s", error)


async def _renew(context: ssl.SSLContext, certificates: Path) -> None:
    """Take a renewed certificate, which the kubelet puts into the folder."""
    while True:
        await asyncio.sleep(CERTIFICATE_EVERY_S)
        try:
            await asyncio.to_thread(load_certificate, context, certificates)
        except OSError as error:  # half of it was new
            logger.warning("the certificate could not be read: %s", error)


async def run(settings: MetricsApiSettings) -> None:
    """Serve until told to stop."""
    kube = await kubernetes.connect()
    tls = read_tls(settings.redis_tls)
    connections = Connections(settings, tls)
    try:
        trust = await read_trust(kube)
        context: ssl.SSLContext = server_context(trust, settings.certificates)
        async with serving(MetricsApi(kube, connections, trust).application(), settings.port, context):
            logger.info("serving %s on port %d to %s", ROOT, settings.port, ", ".join(trust.names) or "every name")
            registration = Registration(kube, settings, time.monotonic)
            with stop_on_signals() as stopped:
                await first_of(
                    _watch_trust(kube, trust),
                    _renew(context, settings.certificates),
                    registration.run(),
                    *([until_renewed(settings.redis_tls, tls)] if settings.redis_tls else []),
                    stopped.wait(),
                )
    finally:
        await connections.aclose()
        await kube.close()


def main() -> None:
    """Start the metrics API."""
    settings = CliApp.run(MetricsApiSettings)
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(run(settings))


if __name__ == "__main__":
    main()
