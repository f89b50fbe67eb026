"""The admin port: liveness, readiness, metrics and what the last iterations did. Not for clients."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import FastAPI, Query
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from coserve_agent.engine.client import EngineClient
from coserve_agent.http.middleware import AnswerMistakes
from coserve_agent.lifecycle import Lifecycle
from coserve_agent.telemetry.metrics import RING_SIZE, Metrics
from coserve_agent.telemetry.slo import SloMeter


def build(lifecycle: Lifecycle, metrics: Metrics, meter: SloMeter, engine: EngineClient) -> FastAPI:
    """The application of the admin port."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.add_middleware(AnswerMistakes)

    @app.get("/health")
    async def health() -> Response:
        if not engine.alive:
            return JSONResponse({"status": "the engine stopped"}, status_code=500)
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        reason = lifecycle.not_ready()
        said = {"status": reason or "ready"} | ({} if lifecycle.slow is None else {"warning": lifecycle.slow})
        return JSONResponse(said, status_code=200 if reason is None else 503)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.render(meter), media_type=CONTENT_TYPE_LATEST)

    @app.get("/debug/iterations")
    async def iterations(
        since: float = 0.0, limit: Annotated[int, Query(ge=1, le=RING_SIZE)] = RING_SIZE
    ) -> dict[str, Any]:
        return {"now": time.monotonic(), "iterations": metrics.iterations.since(since, limit)}

    @app.get("/debug/requests")
    def requests(since: float = 0.0) -> dict[str, Any]:
        return {"now": time.monotonic(), "requests": meter.paths.since(since)}

    return app
