"""The HTTP API for jobs, and what it answers where jobs are custom resources."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from coserve_agent.http.body import read_json
from coserve_agent.http.errors import ApiError, bad_request
from coserve_agent.http.stream import DONE, EventStream, error_event, event
from coserve_agent.standalone.controller import Controller
from coserve_agent.standalone.history import place_of
from coserve_agent.standalone.job import State
from coserve_agent.standalone.spec import parse_job

JOBS = "/v1/finetune_jobs"
DELETE_S = 30.0
_OVER = (State.COMPLETED, State.FAILED, State.CANCELLED)


def add(app: FastAPI, controller: Controller, max_body_bytes: int) -> None:
    """Let `app` answer them."""

    def shown(name: str) -> dict[str, Any]:
        found = controller.view(name)
        if found is None:
            raise missing(name)
        return found

    @app.post(JOBS)
    async def create(request: Request) -> Response:
        job = parse_job(await read_json(request, max_body_bytes))
        return JSONResponse(await controller.create(job), 201)

    @app.get(JOBS)
    async def jobs() -> dict[str, Any]:
        return {"object": "list", "data": controller.views()}

    @app.get(JOBS + "/{name}")
    async def job(name: str) -> dict[str, Any]:
        return shown(name)

    @app.delete(JOBS + "/{name}")
    async def delete(name: str) -> dict[str, Any]:
        uid = (await controller.change(name, deleted=True))["uid"]
        try:
            async with asyncio.timeout(DELETE_S):
                while (left := controller.view(name)) is not None and left["uid"] == uid:
                    await controller.looked()
        except TimeoutError:
            message = f"job {name} is being cancelled, and is deleted then"
            raise ApiError(503, message, code="not_yet", retry_after_s=5) from None
        return {"object": "finetune_job.deleted", "name": name, "uid": uid, "deleted": True}

    @app.post(JOBS + "/{name}/suspend")
    async def suspend(name: str) -> dict[str, Any]:
        return await controller.change(name, suspended=True)

    @app.post(JOBS + "/{name}/resume")
    async def resume(name: str) -> dict[str, Any]:
        return await controller.change(name, suspended=False)

    @app.post(JOBS + "/{name}/cancel")
    async def cancel(name: str) -> dict[str, Any]:
        return await controller.change(name, cancelled=True)

    @app.get(JOBS + "/{name}/events")
    async def events(request: Request, name: str) -> Response:
        after = request.query_params.get("after", "-1")
        if not after.removeprefix("-").isdigit() or len(after) > 16:
            raise bad_request(f"after is {after[:40]!r}: give the last step that is known", "after", "invalid_value")
        return EventStream(told(controller, shown(name), int(after)), lambda: None, error_event)


async def told(controller: Controller, job: dict[str, Any], after: int) -> AsyncGenerator[bytes]:
    """A job's steps and evaluations after step `after`, and each change of its state, until it is over, or the server
    drains.
    """
    name, uid = job["name"], job["uid"]
    last, said = (after, 1), None
    while True:
        found = controller.view(name)
        if found is None or found["uid"] != uid:
            yield event({"type": "deleted"})
            break
        for one in await controller.history.after(uid, last, controller.logs(uid)):
            last = place_of(one)
            yield event(one)
        state = {key: found[key] for key in ("state", "reason", "message")}
        if state != said:
            said = state
            yield event({"type": "state", **state, "step": found["step"], "total_steps": found["total_steps"]})
        if found["state"] in _OVER:
            break
        if controller.draining:  # a stream that goes on would hold the server up
            yield event({"type": "draining"})
            break
        await controller.looked()
    yield DONE


def refuse(app: FastAPI, message: str) -> None:
    """Let `app` say why there are none."""

    async def refused(request: Request) -> Response:
        return ApiError(501, message, code="not_implemented").response(request.url.path)

    for path in (JOBS, JOBS + "/{rest:path}"):
        app.add_route(path, refused, ["GET", "POST", "DELETE"])


def missing(name: str) -> ApiError:
    return ApiError(404, f"there is no job {name!r}; GET {JOBS} lists them", code="job_not_found")
