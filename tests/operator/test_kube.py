"""The client of the API server: long lists come in pages, and a call that is put off is made again."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from kubernetes.aio import config
from kubernetes.aio.client import ApiClient, Configuration

from coserve_operator import kube as module
from coserve_operator.kube import CONFIG_MAP, ConflictError, InvalidError, Kube, NotFoundError, UnavailableError


@pytest.mark.apiserver
async def test_a_list_is_whole_whatever_a_page_holds(api_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"namespace": "default", "labels": {"test": "pages"}}}
    names = [f"page-{n}" for n in range(5)]
    for name in names:
        manifest = body | {"metadata": body["metadata"] | {"name": name}}  # type: ignore[operator]
        done = api_server.kubectl("create", "-f", "-", stdin=json.dumps(manifest))
        assert done.returncode == 0, done.stderr
    configuration = Configuration()
    await config.load_kube_config(str(api_server.kubeconfig), client_configuration=configuration)  # type: ignore[no-untyped-call]
    kube = Kube(ApiClient(configuration))
    try:
        for page in (1, 2, 5, 500):
            monkeypatch.setattr(module, "PAGE", page)
            listed, version = await kube.list_all(CONFIG_MAP, "test=pages")
            assert [each["metadata"]["name"] for each in listed] == names
            assert version > 0
    finally:
        await kube.close()


class Overloaded:
    """Puts off the first calls."""

    def __init__(self, times: int) -> None:
        self.times, self.calls = times, 0
        self.refusal: tuple[int, str] | None = None

    async def answer(self, request: web.Request) -> web.Response:
        self.calls += 1
        if self.refusal is not None:
            return web.Response(status=self.refusal[0], text=self.refusal[1])
        if self.calls <= self.times:
            return web.json_response({"message": "too many requests"}, status=429, headers={"Retry-After": "3"})
        return web.json_response({"metadata": {"name": "there"}})


@pytest.fixture
async def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were waited."""
    seconds: list[float] = []

    async def sleep(delay_s: float) -> None:
        seconds.append(delay_s)

    # the name in this module only: servers of other tests sleep in threads beside
    monkeypatch.setattr(module, "asyncio", SimpleNamespace(sleep=sleep))
    return seconds


@pytest.fixture
async def overloaded() -> AsyncIterator[Any]:
    running: list[web.AppRunner] = []

    async def start(times: int) -> tuple[Overloaded, Kube]:
        server, application = Overloaded(times), web.Application()
        application.router.add_route("*", "/{path:.*}", server.answer)
        runner = web.AppRunner(application)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        running.append(runner)
        return server, Kube(ApiClient(Configuration(host=f"http://127.0.0.1:{runner.addresses[0][1]}")))

    yield start
    for runner in running:
        await runner.cleanup()


async def test_a_call_that_is_put_off_is_made_again_when_the_server_says(overloaded: Any, slept: list[float]) -> None:
    server, kube = await overloaded(2)
    try:
        assert await kube.get(CONFIG_MAP, "default", "there") == {"metadata": {"name": "there"}}
    finally:
        await kube.close()
    assert server.calls == 3
    assert len(slept) == 2
    assert all(3.0 <= each <= 4.5 for each in slept)


async def test_after_some_calls_it_is_left_to_the_queue(overloaded: Any, slept: list[float]) -> None:
    server, kube = await overloaded(99)
    try:
        with pytest.raises(UnavailableError, match=r"429: GET .*: too many requests"):
            await kube.get(CONFIG_MAP, "default", "there")
    finally:
        await kube.close()
    assert server.calls == module.PATIENCE


@pytest.mark.parametrize(
    ("status", "text", "error"),
    [
        *((status, "{}", InvalidError) for status in (400, 401, 403, 405, 413, 422)),
        (500, '{"kind": "Status", "message": "duplicate entries for key [name=HOME]"}', InvalidError),
        (500, "upstream connect error", UnavailableError),
        *((status, '{"kind": "Status"}', UnavailableError) for status in (502, 503, 504)),
        (404, "{}", NotFoundError),
        (409, "{}", ConflictError),
    ],
)
async def test_what_is_refused_in_words_is_no_outage(overloaded: Any, status: int, text: str, error: Any) -> None:
    server, kube = await overloaded(0)
    server.refusal = status, text
    try:
        with pytest.raises(error) as caught:
            await kube.get(CONFIG_MAP, "default", "there")
    finally:
        await kube.close()
    assert type(caught.value) is error
    if "duplicate" in text:
        assert "duplicate entries for key" in caught.value.message
