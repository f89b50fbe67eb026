"""Clients that keep their connections: http.client, httpx and openai, none of which sends a request again.

BASE_URL MODEL CLIENTS RATE; CLIENTS connections send RATE requests a second together until a line comes on standard
input. Prints a JSON object: sent, and failed, a list of what went wrong.
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx
import openai

TIMEOUT_S = 60
Ask = Callable[[], str]
"""Sends one completion over the client's one connection and returns its finish reason; raises where it fails."""


def body(model: str) -> dict[str, object]:
    return {"model": model, "prompt": "the quick brown fox", "max_tokens": 8, "ignore_eos": True, "temperature": 0}


@contextmanager
def plain(base_url: str, model: str) -> Iterator[Ask]:
    """Reuses its connection without a look at it, and fails where that was closed."""
    where = urlsplit(base_url)
    with closing(http.client.HTTPConnection(str(where.hostname), where.port, timeout=TIMEOUT_S)) as connection:

        def ask() -> str:
            try:
                connection.request("POST", "/v1/completions", json.dumps(body(model)))
                answer = connection.getresponse()
                data = answer.read()
            except (OSError, http.client.HTTPException):
                connection.close()  # the next request is not to fail for this one's reason
                raise
            if answer.status != 200:
                raise RuntimeError(f"HTTP {answer.status}: {data[:200]!r}")
            return str(json.loads(data)["choices"][0]["finish_reason"])

        yield ask


@contextmanager
def pooled(base_url: str, model: str) -> Iterator[Ask]:
    """httpx."""
    with httpx.Client(base_url=base_url, timeout=TIMEOUT_S) as client:

        def ask() -> str:
            answer = client.post("/v1/completions", json=body(model))
            answer.raise_for_status()
            return str(answer.json()["choices"][0]["finish_reason"])

        yield ask


@contextmanager
def official(base_url: str, model: str) -> Iterator[Ask]:
    """The openai client; half of its requests are streams."""
    with openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S) as client:
        sent = 0

        def ask() -> str:
            nonlocal sent
            sent += 1
            common = {"model": model, "prompt": "the quick brown fox", "max_tokens": 8, "temperature": 0}
            extra = {"ignore_eos": True}
            if sent % 2:
                answer = client.completions.create(**common, extra_body=extra)
                return str(answer.choices[0].finish_reason)
            chunks = list(client.completions.create(**common, extra_body=extra, stream=True))
            return str(chunks[-1].choices[0].finish_reason)

        yield ask


KINDS = (plain, pooled, official)


@dataclass
class Load:
    """Threads, one for each client, of which every third is of the same kind; `with` runs them."""

    base_url: str
    model: str
    clients: int = 6
    rate: float = 15.0
    sent: list[int] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sent = [0] * self.clients
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._client, args=(n,)) for n in range(self.clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def _client(self, n: int) -> None:
        kind, period_s = KINDS[n % len(KINDS)], self.clients / self.rate
        begun_s = time.monotonic() + period_s * n / self.clients
        with kind(self.base_url, self.model) as ask:
            while not self._end.wait(max(0.0, begun_s + self.sent[n] * period_s - time.monotonic())):
                try:
                    if (reason := ask()) != "length":
                        raise RuntimeError(f"finish_reason is {reason}")
                except Exception as error:
                    self.failed.append(f"{time.strftime('%X')} {kind.__name__}: {type(error).__name__}: {error}")
                self.sent[n] += 1


if __name__ == "__main__":
    base_url, model, clients, rate = sys.argv[1:]
    with Load(base_url, model, int(clients), float(rate)) as load:
        sys.stdin.readline()
    print(json.dumps({"sent": sum(load.sent), "failed": load.failed}))
