"""`coserve chat`: a conversation with a served model; with standard input from elsewhere, one answer."""

from __future__ import annotations

import sys
from typing import Any

import click

from coserve_cli.client import Server, url_option
from coserve_cli.console import say

ASKS = "> "


@click.command(epilog="Ctrl-C ends an answer, Ctrl-D the conversation; /new begins another one.")
@click.argument("message", required=False)
@url_option
@click.option("--model", help="A name that the server lists.  [default: its base model]")
@click.option("--system", help="The system message.")
@click.option("--temperature", type=click.FloatRange(0), help="[default: the model's own]")
@click.option("--max-tokens", type=click.IntRange(1), help="Of an answer.")
def chat(
    message: str | None, url: str, api_key: str | None, model: str | None, system: str | None, **chosen: Any
) -> None:
    """Talk to a model that is served. With MESSAGE, or text from a pipe, it answers that and ends."""
    server = Server(url, api_key)
    name = server.model(model)
    begin = [] if system is None else [{"role": "system", "content": system}]
    options = {key: value for key, value in chosen.items() if value is not None} | {"model": name}
    if message is None and not sys.stdin.isatty():
        message = sys.stdin.read()
    if message is not None:
        _answer(server, [*begin, {"role": "user", "content": message}], options)
        return
    say(f"{name} at {server.url}; /new begins anew, Ctrl-D ends")
    turns = list(begin)
    while True:
        try:
            text = input(ASKS)
        except EOFError:
            click.echo()
            return
        if text.strip() == "/new":
            turns = list(begin)
        elif text.strip():
            turns.append({"role": "user", "content": text})
            try:
                turns.append({"role": "assistant", "content": _answer(server, turns, options)})
            except KeyboardInterrupt:
                turns.pop()
                say("\n(broken off; it is forgotten)")
            except click.ClickException as error:
                turns.pop()
                error.show()


def _answer(server: Server, turns: list[dict[str, str]], options: dict[str, Any]) -> str:
    """Prints the answer as it comes, thoughts apart, and returns its content."""
    content, thinks = "", False
    for event in server.stream("/v1/chat/completions", {"messages": turns, "stream": True, **options}):
        for choice in event["choices"]:
            delta = choice["delta"]
            if thought := delta.get("reasoning_content"):
                thinks = True
                click.echo(click.style(thought, dim=True), nl=False)
            if text := delta.get("content"):
                if thinks:
                    click.echo()
                thinks = False
                content += text
                click.echo(text, nl=False)
    click.echo()
    return content
