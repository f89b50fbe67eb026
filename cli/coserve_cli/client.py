"""A server that runs, as the commands that talk to it see it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
import httpx

URL = "http://127.0.0.1:8000"
CONNECT_S = 5.0


def url_option(command: Any) -> Any:
    """--url and --api-key."""
    command = click.option("--api-key", envvar="OPENAI_API_KEY", help="Where the server asks for one.")(command)
    return click.option("--url", default=URL, show_default=True, help="Where the server listens.")(command)


class Server:
    """Requests of OpenAI's API to one server.

    Raises:
        click.ClickException: it cannot be reached, or refuses; the message says what it said.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {} if not api_key else {"Authorization": f"Bearer {api_key}"}
        self._http = httpx.Client(
            base_url=self.url, headers=headers, timeout=httpx.Timeout(None, connect=CONNECT_S), trust_env=False
        )

    def get(self, path: str) -> Any:
        with self._blaming():
            return _checked(self._http.get(path))

    def post(self, path: str, body: Any) -> Any:
        with self._blaming():
            return _checked(self._http.post(path, json=body))

    def models(self) -> list[str]:
        """The names that it serves, the base model's first."""
        return [str(one["id"]) for one in self.get("/v1/models")["data"]]

    def model(self, given: str | None) -> str:
        """The name that was given, or the base model's; click.UsageError where the server lists no such name."""
        names = self.models()
        if given is not None and given not in names:
            raise click.UsageError(f"--model is {given!r}; the server has {', '.join(names)}")
        return given or names[0]

    def stream(self, path: str, body: Any) -> Iterator[dict[str, Any]]:
        """The events of a streamed answer, without the last word."""
        with self._blaming(), self._http.stream("POST", path, json=body) as answer:
            if answer.status_code != 200:
                answer.read()
                _checked(answer)
            for line in answer.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise click.ClickException(str(event["error"].get("message", event["error"])))
                    yield event

    def close(self) -> None:
        self._http.close()

    @contextmanager
    def _blaming(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError:
            raise click.ClickException(
                f"nothing listens on {self.url}; start a server with: coserve serve MODEL, or name another with --url"
            ) from None
        except httpx.HTTPError as error:
            raise click.ClickException(f"{self.url}: {error or type(error).__name__}") from None
        except (httpx.InvalidURL, ValueError) as error:
            raise click.ClickException(f"{self.url}: {error}") from None


def _checked(answer: httpx.Response) -> Any:
    try:
        body = answer.json()
    except ValueError:
        body = None
    if answer.is_success and body is not None:
        return body
    said = body.get("error", body) if isinstance(body, dict) else answer.text[:200]
    message = said.get("message", said) if isinstance(said, dict) else said
    raise click.ClickException(f"{answer.url} answers {answer.status_code}: {message or 'nothing'}")
