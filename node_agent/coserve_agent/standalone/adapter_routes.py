"""vLLM's routes that load and unload adapters, and what they answer where adapters are published."""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from coserve_agent.http.body import read_json
from coserve_agent.http.errors import ApiError
from coserve_agent.requests.common import explain
from coserve_agent.standalone.adapters import LoadedAdapters

R = TypeVar("R", bound=BaseModel)

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class LoadRequest(_Body):
    """`lora_path` is below the server's --adapter-dir; `load_inplace`: what has the name is replaced."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadRequest(_Body):
    lora_name: str


def add(app: FastAPI, adapters: LoadedAdapters, max_body_bytes: int) -> None:
    """Let `app` answer them."""

    @app.post(LOAD)
    async def load(request: Request) -> dict[str, Any]:
        asked = _parsed(LoadRequest, await read_json(request, max_body_bytes))
        number = await adapters.load(asked.lora_name, asked.lora_path, again=asked.load_inplace)
        return {"message": f"adapter {asked.lora_name} is loaded", "name": asked.lora_name, "version": number}

    @app.post(UNLOAD)
    async def unload(request: Request) -> dict[str, Any]:
        name = _parsed(UnloadRequest, await read_json(request, max_body_bytes)).lora_name
        adapters.unload(name)
        return {"message": f"adapter {name} is unloaded", "name": name}


def refuse(app: FastAPI, message: str) -> None:
    """Let `app` say why there are none."""

    async def refused(request: Request) -> Response:
        return ApiError(501, message, code="not_implemented").response(request.url.path)

    for path in (LOAD, UNLOAD):
        app.add_route(path, refused, ["POST"])


def _parsed(kind: type[R], body: dict[str, Any]) -> R:
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise explain(error) from None
