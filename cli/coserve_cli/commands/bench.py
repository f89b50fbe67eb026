"""`coserve bench [URL]`."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import click
import httpx
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from coserve_cli.client import CONNECT_S, URL, Server
from coserve_cli.console import console, say
from coserve_cli.load.arrivals import Arrival, poisson, recorded
from coserve_cli.load.report import Promise, Report, report
from coserve_cli.load.sender import Sample, prompts_of, send_all

MOST = 100_000
"""Requests of a run: a loop is bounded."""


@click.command(
    epilog="It is an open loop: what is due is sent, however many answers are on the way. A request is in time if its "
    "first token is, and 99 % of its gaps; one that fails is not. Exit status: 1 where a request failed."
)
@click.argument("url", default=URL)
@click.option("--api-key", envvar="OPENAI_API_KEY", help="Where the server asks for one.")
@click.option("--model", help="A name that the server lists.  [default: its base model]")
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Requests a second on average.  [default: 1]")
@click.option("--requests", default=60, show_default=True, type=click.IntRange(1, MOST), help="To send.")
@click.option("--prompt-tokens", default=128, show_default=True, type=click.IntRange(1), help="Of each prompt.")
@click.option("--output-tokens", default=64, show_default=True, type=click.IntRange(1), help="Of each answer.")
@click.option(
    "--trace",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A CSV with TIMESTAMP, ContextTokens, GeneratedTokens instead; with --rate it is stretched.",
)
@click.option("--ttft-ms", default=1000.0, show_default=True, type=click.FloatRange(0, min_open=True), help="In time.")
@click.option("--tpot-ms", default=200.0, show_default=True, type=click.FloatRange(0, min_open=True), help="In time.")
@click.option("--seed", default=0, show_default=True, help="Of gaps and prompts.")
@click.option("--timeout", "timeout_s", default=600.0, show_default=True, type=click.FloatRange(1), help="Seconds.")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON on standard output.")
def bench(
    url: str,
    api_key: str | None,
    model: str | None,
    rate: float | None,
    requests: int,
    prompt_tokens: int,
    output_tokens: int,
    trace: Path | None,
    ttft_ms: float,
    tpot_ms: float,
    seed: int,
    timeout_s: float,
    as_json: bool,
) -> None:
    """Send requests to URL at a rate, and say what its clients see."""
    server = Server(url, api_key)
    name = server.model(model)
    server.close()
    try:
        arrivals = (
            recorded(trace, requests, rate)
            if trace is not None
            else poisson(requests, rate or 1.0, prompt_tokens, output_tokens, seed)
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    samples: list[Sample] = []
    try:
        asyncio.run(_run(server.url, api_key, name, arrivals, seed, timeout_s, samples))
    except KeyboardInterrupt:
        say("broken off; what was sent and has not ended counts as failed")
    made = report(samples, Promise(ttft_ms, tpot_ms))
    if as_json:
        click.echo(json.dumps(made.to_json(), indent=2))
    else:
        _show(made)
    sys.exit(1 if made.failed else 0)


async def _run(
    url: str,
    api_key: str | None,
    model: str,
    arrivals: list[Arrival],
    seed: int,
    timeout_s: float,
    seen: list[Sample],
) -> None:
    headers = {} if not api_key else {"Authorization": f"Bearer {api_key}"}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx.Timeout(timeout_s, connect=max(CONNECT_S, timeout_s / 10), pool=None)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    async with httpx.AsyncClient(
        base_url=url, headers=headers, limits=limits, timeout=timeout, trust_env=False
    ) as http:
        prompts = await prompts_of(http, seed)
        with bar:
            task = bar.add_task("answered", total=len(arrivals))

            def changed() -> None:
                bar.update(task, completed=sum(bool(sample.ended_s) for sample in seen))

            await send_all(http, model, arrivals, prompts, seen, changed)


def _show(made: Report) -> None:
    click.echo(f"requests     {made.requests} in {made.seconds:.1f} s, {made.failed} failed")
    for error, count in made.errors.items():
        click.echo(f"             {count} x {error}")
    click.echo(
        f"tokens       {made.prompt_tokens} in, {made.output_tokens} out, {made.output_tokens_per_s:.1f} a second"
    )
    click.echo(f"{'ms':12} {'P50':>9} {'P90':>9} {'P99':>9}")
    for name, values in (("TTFT", made.ttft_ms), ("TPOT", made.tpot_ms), ("ITL", made.itl_ms), ("whole", made.e2e_ms)):
        click.echo(f"{name:12} " + " ".join("        -" if one is None else f"{one:9.1f}" for one in values.values()))
    promise = made.promise_ms
    click.echo(
        f"in time      {made.in_time_percent:.1f} % of all (TTFT {promise['ttft']:g} ms, gaps {promise['tpot']:g} ms); "
        f"goodput {made.goodput_per_s:.2f} requests a second"
    )
