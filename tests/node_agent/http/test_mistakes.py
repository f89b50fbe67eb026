"""A handler that raises costs its own request and no other: the connection goes on, in every client that pools."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from coserve_agent.http.errors import mistake
from coserve_agent.http.middleware import AnswerMistakes
from coserve_agent.http.servers import Server, listen
from coserve_agent.text.detokenize import Detokenizer

CHAT = [{"role": "user", "content": "one"}]
GOOD = {"model": "base", "messages": CHAT, "max_tokens": 4, "temperature": 0}
BAD = GOOD | {"messages": [{"role": "user", "content": "one BROKEN"}]}
CODE = "internal_error"

Post = Callable[[dict[str, Any]], tuple[int, Any]]
"""Sends a chat completion; status and body."""


@pytest.fixture
def broken(served: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The agent, with a tokenizer that fails on one word."""
    encode = served.agent.tokenizer.encode_chat

    def failing(messages: list[dict[str, str]], *rest: Any, **more: Any) -> list[int]:
        if "BROKEN" in messages[-1]["content"]:
            raise LookupError("broken on purpose")
        return encode(messages, *rest, **more)  # type: ignore[no-any-return]

    monkeypatch.setattr(served.agent.tokenizer, "encode_chat", failing)
    return served


def plain(url: str) -> Iterator[Post]:
    with closing(http.client.HTTPConnection("127.0.0.1", int(url.rpartition(":")[2]), timeout=60)) as connection:

        def post(body: dict[str, Any]) -> tuple[int, Any]:
            connection.request("POST", "/v1/chat/completions", json.dumps(body))
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

        yield post


def pooled(url: str) -> Iterator[Post]:
    with httpx.Client(base_url=url, limits=httpx.Limits(max_connections=1), timeout=60) as client:

        def post(body: dict[str, Any]) -> tuple[int, Any]:
            answer = client.post("/v1/chat/completions", json=body)
            return answer.status_code, answer.json()

        yield post


def official(url: str) -> Iterator[Post]:
    pool = httpx.Client(limits=httpx.Limits(max_connections=1), timeout=60)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=pool) as client:

        def post(body: dict[str, Any]) -> tuple[int, Any]:
            try:
                return 200, client.chat.completions.create(**body).model_dump()
            except openai.APIStatusError as error:
                return error.status_code, {"error": error.body}

        yield post


@pytest.mark.parametrize("kind", [plain, pooled, official])
def test_the_request_after_a_mistake_is_answered_on_the_same_connection(
    broken: Any, kind: Callable[[str], Iterator[Post]]
) -> None:
    def connections() -> list[object]:
        return broken.call(lambda: list(broken.agent.http.server_state.connections))  # type: ignore[no-any-return]

    known = connections()
    clients = kind(broken.url)
    post = next(clients)
    assert post(GOOD)[0] == 200
    (own,) = [one for one in connections() if one not in known]
    for _ in range(6):
        status, body = post(BAD)
        assert status == 500
        assert body["error"]["type"] == "server_error"
        assert body["error"]["code"] == CODE
        assert post(GOOD)[0] == 200
    assert [one for one in connections() if one not in known] == [own]
    clients.close()


LAST: dict[str, Callable[[dict[str, Any]], bool]] = {
    "/v1/chat/completions": lambda event: event["error"]["code"] == CODE,
    "/v1/responses": lambda event: (event["type"], event["response"]["status"]) == ("response.failed", "failed"),
    "/v1/messages": lambda event: (event["type"], event["error"]["type"]) == ("error", "api_error"),
}
"""Whether an event says that there was a mistake, in the words of each API."""


@pytest.mark.parametrize("path", LAST)
def test_a_mistake_in_the_middle_of_a_stream_is_its_last_event(
    served: Any, http: httpx.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    push, calls = Detokenizer.push, []

    def failing(self: Detokenizer, token: int) -> str:
        calls.append(token)
        if len(calls) > 3:
            raise LookupError("broken on purpose")
        return push(self, token)

    with monkeypatch.context() as patch:
        patch.setattr(Detokenizer, "push", failing)
        said = {"input": "one"} if path == "/v1/responses" else {"messages": CHAT, "max_tokens": 50}
        with http.stream(
            "POST", path, json={"model": "base", "ignore_eos": True, "stream": True, "temperature": 0} | said
        ) as answer:
            assert answer.status_code == 200
            lines = [line for line in answer.iter_lines() if line]
    assert LAST[path](json.loads(lines[-1].removeprefix("data: ")))
    assert "broken on purpose" in caplog.text
    assert http.post("/v1/chat/completions", json=GOOD).status_code == 200


@pytest.mark.parametrize("path", ["/metrics", "/ready"])
def test_the_admin_port_answers_a_mistake_too(served: Any, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    def broken(*_: object) -> None:
        raise LookupError("broken on purpose")

    with httpx.Client(base_url=served.admin_url, limits=httpx.Limits(max_connections=1)) as client:
        with monkeypatch.context() as patch:
            patch.setattr(served.agent.metrics, "render", broken)
            patch.setattr(served.agent.lifecycle, "not_ready", broken)
            answer = client.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, CODE)
        assert client.get(path).status_code == 200


async def second_answer(app: FastAPI) -> bytes:
    """What a client gets for a good request on the connection on which a handler has just raised."""
    server = Server(app, listen("127.0.0.1", 0, "PORT"))
    task = asyncio.create_task(server.run_until_stopped())
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        writer.write(b"GET /bad HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b" 500 " in await reader.readline()
        await reader.readuntil(b"}}")
        writer.write(b"GET /good HTTP/1.1\r\nHost: x\r\n\r\n")
        return await reader.readline()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()
        server.stop()
        await task


def app_that_fails() -> FastAPI:
    app = FastAPI()

    @app.get("/bad")
    async def bad() -> None:
        raise LookupError("broken on purpose")

    @app.get("/good")
    async def good() -> None: ...

    return app


async def test_starlettes_own_handler_loses_the_next_request() -> None:
    """The control."""
    app = app_that_fails()
    app.add_exception_handler(Exception, lambda request, error: mistake().response("/"))
    assert await second_answer(app) == b""
    app = app_that_fails()
    app.add_middleware(AnswerMistakes)
    assert b" 200 " in await second_answer(app)
