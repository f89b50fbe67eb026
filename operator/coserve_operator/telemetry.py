"""What the operator shows of itself: /healthz and /readyz for the kubelet, /metrics for Prometheus."""

from collections.abc import Callable
from dataclasses import dataclass, field

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SILENCE_S = 60.0
"""A leader whose loops have not come round for this long is restarted."""


@dataclass
class Telemetry:
    """Figures of one operator process."""

    clock: Callable[[], float]
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        self.leading = Gauge("coserve_operator_leading", "1 in the replica that works", registry=self.registry)
        self.redis_up = Gauge("coserve_operator_redis_up", "1 while every Redis can be read", registry=self.registry)
        self.queue = Gauge("coserve_operator_queue_length", "Groups that wait", registry=self.registry)
        self.reconciles = Counter(
            "coserve_operator_reconciles_total", "Passes over a group", ["outcome"], registry=self.registry
        )
        self.seconds = Histogram(
            "coserve_operator_reconcile_seconds", "Duration of a pass", registry=self.registry,
            buckets=(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
        )  # fmt: skip
        self.faults = Counter(
            "coserve_operator_faults_total",
            "Loops that ended by a fault and began again",
            ["loop"],
            registry=self.registry,
        )
        self.trouble: Callable[[], str] = str
        """Says why this replica could not work if it had to; empty when it could."""
        self._beats: dict[str, float] = {}

    def beat(self, loop: str) -> None:
        """Note that a loop has come round."""
        self._beats[loop] = self.clock()

    def silent(self) -> list[str]:
        """Return the loops that have not come round for too long."""
        return [loop for loop, at in self._beats.items() if self.clock() - at > SILENCE_S]

    def application(self) -> web.Application:
        """Return the HTTP server."""
        application = web.Application()
        application.router.add_get("/healthz", self._healthz)
        application.router.add_get("/readyz", self._readyz)
        application.router.add_get("/metrics", self._metrics)
        return application

    async def _healthz(self, _: web.Request) -> web.Response:
        silent = self.silent()
        return web.Response(text=f"silent: {', '.join(silent)}" if silent else "ok", status=503 if silent else 200)

    async def _readyz(self, request: web.Request) -> web.Response:
        trouble = self.trouble()
        return web.Response(text=trouble, status=503) if trouble else await self._healthz(request)

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self.registry), headers={"Content-Type": "text/plain; version=0.0.4"})
