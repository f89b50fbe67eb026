"""The end of an agent: for a while after SIGTERM it serves on and asks clients to leave, and none loses a request."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from keep_alive import Load

SHORT = {"model": "base", "prompt": "one", "max_tokens": 2, "ignore_eos": True, "temperature": 0}
LONG = SHORT | {"max_tokens": 250}
FORWARDER = Path(__file__).with_name("forwarder.py")
UPDATE_S = 1.5
"""How long the stand-in for kube-proxy goes on sending new connections to an agent that drains."""


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


# ---- many clients ----


@contextmanager
def forwarder(*agents: Any) -> Iterator[str]:
    """The URL under which all of them are reached."""
    ports = [f"{port_of(one.url)}:{port_of(one.admin_url)}" for one in agents]
    command = [sys.executable, str(FORWARDER), str(UPDATE_S), *ports]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.communicate()


def end_one_of_two_under_load(one: Any, other: Any) -> Load:
    """SIGTERM to `one` while six clients send 15 requests a second to both; what came of the requests."""
    with forwarder(one, other) as url, Load(url, "base") as load:
        until(lambda: min(load.sent) >= 5)
        assert load.failed == []
        assert one.program.terminate() == 0
        after = list(load.sent)
        until(lambda: all(now >= before + 5 for now, before in zip(load.sent, after, strict=True)))
    return load


def test_clients_that_keep_their_connections_lose_nothing(start_processes: Callable[..., list[Any]]) -> None:
    load = end_one_of_two_under_load(*start_processes({}, {"drain_s": 0}))
    assert load.failed == []


def test_without_a_drain_they_do(start_processes: Callable[..., list[Any]]) -> None:
    """The control: the test above sees what it is about."""
    load = end_one_of_two_under_load(*start_processes({"drain_s": 0}, {"drain_s": 0}))
    assert load.failed
    kinds = ("ConnectionResetError", "BrokenPipeError", "ConnectError", "ReadError", "RemoteDisconnected")
    assert any(kind in failure for failure in load.failed for kind in kinds), load.failed


# ---- what one client sees ----


class Plain:
    """One connection of http.client's, which neither looks at it before a request nor repeats one."""

    def __init__(self, url: str) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port_of(url), timeout=60)

    def ask(self, **changes: object) -> http.client.HTTPResponse:
        self.connection.request("POST", "/v1/completions", json.dumps(SHORT | changes))
        answer = self.connection.getresponse()
        answer.read()
        return answer

    def end(self) -> bytes:
        """What comes when nothing was asked: nothing, if the other side closed; raises if it reset."""
        return bytes(self.connection.sock.recv(1))


@pytest.fixture
def connect() -> Iterator[Callable[[str], Plain]]:
    with ExitStack() as open_ones:

        def made(url: str) -> Plain:
            one = Plain(url)
            open_ones.callback(one.connection.close)
            return one

        yield made


def stream(url: str, begun: threading.Event, lines: list[str]) -> None:
    with httpx.stream("POST", f"{url}/v1/completions", json=LONG | {"stream": True}, timeout=60) as answer:
        for line in answer.iter_lines():
            if line:
                lines.append(line)
                begun.set()


def test_an_agent_that_drains_answers_and_says_that_it_leaves(
    start_processes: Callable[..., list[Any]], connect: Callable[[str], Plain]
) -> None:
    (agent,) = start_processes({})
    pooled, idle, late, unused, streamed = (connect(agent.url) for _ in range(5))
    for one in (pooled, idle, late):
        assert one.ask().getheader("connection") is None
    unused.connection.connect()
    streamed.connection.request("POST", "/v1/completions", json.dumps(LONG | {"stream": True}))
    begun = streamed.connection.getresponse()
    assert begun.getheader("connection") is None
    assert begun.readline().startswith(b"data: {")

    agent.program.process.send_signal(signal.SIGTERM)
    until(lambda: httpx.get(f"{agent.admin_url}/ready").status_code == 503)
    assert "draining" in httpx.get(f"{agent.admin_url}/ready").json()["status"]
    assert httpx.get(f"{agent.admin_url}/health").status_code == 200
    assert "vllm:num_requests_running" in httpx.get(f"{agent.admin_url}/metrics").text
    assert (answer := pooled.ask()).status == 200
    assert answer.getheader("connection") == "close"
    assert (answer := connect(agent.url).ask()).status == 200
    assert answer.getheader("connection") == "close"
    assert (answer := connect(agent.url).ask(max_tokens="many")).status == 400
    assert answer.getheader("connection") == "close"
    *_, last, done = filter(None, begun.read().decode().split("\n"))
    assert done == "data: [DONE]"
    assert json.loads(last[6:])["choices"][0]["finish_reason"] == "length"
    assert (answer := streamed.ask()).status == 200  # its client could not know
    assert answer.getheader("connection") == "close"

    agent.program.process.send_signal(signal.SIGTERM)  # a second one changes nothing
    assert connect(agent.url).ask().status == 200
    assert late.ask().getheader("connection") == "close"

    until(lambda: "accepts no more connections" in agent.program.log)
    with pytest.raises(ConnectionRefusedError):
        connect(agent.url).ask()
    assert idle.end() == unused.end() == b""
    assert agent.program.process.wait(30) == 0
    assert "Traceback" not in agent.program.log


def test_an_idle_connection_is_served_for_as_long_as_others_are(
    start_agent: Callable[..., Any], connect: Callable[[str], Plain]
) -> None:
    """After the listener is closed, too: what runs holds the agent, and its open connections with it."""
    agent = start_agent(drain_s=0)
    pid = agent.call(lambda: agent.agent.engine_host.pid)
    idle = connect(agent.url)
    assert idle.ask().status == 200
    begun, lines = threading.Event(), []
    streaming = threading.Thread(target=stream, args=(agent.url, begun, lines))
    streaming.start()
    assert begun.wait(30)
    os.kill(pid, signal.SIGSTOP)  # the stream does not end before we say so
    try:
        agent.loop.call_soon_threadsafe(agent.agent.stop)
        until(lambda: not agent.call(agent.agent.http.servers[0].is_serving))
        idle.connection.request("GET", "/v1/models")
        answer = idle.connection.getresponse()
        answer.read()
        assert answer.status == 200
        assert answer.getheader("connection") == "close"
    finally:
        os.kill(pid, signal.SIGCONT)
    streaming.join()
    assert lines[-1] == "data: [DONE]"
    agent.stop()
    assert agent.status == 0


def test_what_outlasts_the_grace_period_is_told_so(start_agent: Callable[..., Any]) -> None:
    agent = start_agent(drain_s=0, shutdown_s=1)
    pid = agent.call(lambda: agent.agent.engine_host.pid)
    begun, lines, answers = threading.Event(), [], []
    threads = [
        threading.Thread(target=stream, args=(agent.url, begun, lines)),
        threading.Thread(
            target=lambda: answers.append(httpx.post(f"{agent.url}/v1/completions", json=LONG, timeout=60))
        ),
    ]
    threads[0].start()
    assert begun.wait(30)
    os.kill(pid, signal.SIGSTOP)
    try:
        threads[1].start()
        until(lambda: agent.call(agent.agent.engine.in_flight) == 2)
        agent.loop.call_soon_threadsafe(agent.agent.stop)
        for thread in threads:
            thread.join()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert json.loads(lines[-1][6:])["error"]["code"] == "draining"
    (answer,) = answers
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
    assert answer.headers["connection"] == "close"
    assert answer.headers["retry-after"] == "1"
    agent.stop()
    assert agent.status == 0


def test_an_engine_that_dies_meanwhile_ends_the_drain(start_agent: Callable[..., Any]) -> None:
    agent = start_agent(drain_s=30)
    pid = agent.call(lambda: agent.agent.engine_host.pid)
    agent.loop.call_soon_threadsafe(agent.agent.stop)
    until(lambda: httpx.get(f"{agent.admin_url}/ready").status_code == 503)
    os.kill(pid, signal.SIGKILL)
    agent.stop()
    assert agent.status == 1
