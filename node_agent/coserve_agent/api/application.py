"""The application of the HTTP port: every API's routes, and what they answer where there is none."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.requests import ClientDisconnect

from coserve_agent.api import openapi, probes
from coserve_agent.generation.chat import Serving
from coserve_agent.http.errors import ApiError, on_api_error, on_client_gone, on_unknown_path, on_wrong_method
from coserve_agent.http.middleware import AnswerMistakes
from coserve_agent.http.stream import ClientGoneError
from coserve_agent.messages import routes as messages
from coserve_agent.openai import routes as openai
from coserve_agent.responses import routes as responses


def build(serving: Serving, version: str) -> FastAPI:
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.add_exception_handler(ApiError, on_api_error)
    app.add_middleware(AnswerMistakes)
    app.add_exception_handler(ClientDisconnect, on_client_gone)
    app.add_exception_handler(ClientGoneError, on_client_gone)
    app.add_exception_handler(404, on_unknown_path)
    app.add_exception_handler(405, on_wrong_method)
    openai.add(app, serving)
    responses.add(app, serving)
    messages.add(app, serving)
    probes.add(app, serving.generator, version)
    openapi.add(app, version)
    return app
