"""`coserve serve MODEL`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from coserve_agent.agent import Agent
from coserve_api.common import BatchTokens, ModelLength, ModelName, Origin, Rank, Requests, Threads
from coserve_api.endpoint import Device, Dtype, FinetuningPolicy, NumericsMode, ToolCallParser
from coserve_cli.console import say, say_log
from coserve_cli.models import find_model, short_name
from coserve_cli.options import Checked, MemorySize, Named, names
from coserve_cli.server import run_server, settings_of
from coserve_cli.state import state_folder


@click.command(
    epilog="The model's folder or hf:ORG/NAME is all it needs. A CPU computes in float32: a model of a billion "
    "parameters takes 4 GB, and about as much again as oneDNN lays them out. Ctrl-C ends it: what runs may finish, a "
    "second one does not wait."
)
@click.argument("model")
@click.option("--name", type=Checked("name", ModelName), help="What clients give as `model`; default: the folder's.")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: any that is free.")
@click.option(
    "--admin-port", default=0, type=click.IntRange(0, 65535), help="Of /metrics and /ready; default: any that is free."
)
@click.option("--max-model-length", type=Checked("tokens", ModelLength), help="Tokens of prompt and answer together.")
@click.option("--ttft-ms", type=click.IntRange(1), help="Promised: time to the first token.  [default: 1000]")
@click.option("--tpot-ms", type=click.IntRange(1), help="Promised: time between two tokens.  [default: 200]")
@click.option("--device", type=names(Device), help="What computes.  [default: auto]")
@click.option("--dtype", type=names(Dtype), help="[default: auto: bfloat16 on a GPU, float32 on a CPU]")
@click.option("--numerics-mode", type=names(NumericsMode), help="Exact: the same bits whatever else runs.")
@click.option("--threads", type=Checked("threads", Threads), help="Of a CPU.  [default: its cores but one]")
@click.option("--kv-cache-memory", "kv_cache_bytes", type=MemorySize(), help="[default: 256Mi; what a GPU has left]")
@click.option("--max-requests", type=Checked("requests", Requests), help="That run at once; others wait.")
@click.option("--max-batch-tokens", type=Checked("tokens", BatchTokens), help="Of one forward.")
@click.option("--adapter", "adapters", multiple=True, type=Named(), help="A PEFT folder to serve. May be repeated.")
@click.option(
    "--adapter-dir",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Below it requests may load adapters, by /v1/load_lora_adapter.  [default: none may]",
)
@click.option("--adapter-memory", "adapter_bytes", type=MemorySize(), help="Of all adapters that are loaded at a time.")
@click.option("--max-rank", type=Checked("rank", Rank), help="Of adapters.  [default: 64]")
@click.option("--tool-call-parser", type=names(ToolCallParser), help="[default: found by the chat template]")
@click.option("--cors-origin", "cors_origins", multiple=True, type=Checked("origin", Origin), help="May be repeated.")
@click.option("--state", type=click.Path(path_type=Path), help="Of jobs and adapters.  [default: one for each model]")
@click.option("--no-finetuning", is_flag=True, help="Serve only.")
@click.option("-v", "--verbose", is_flag=True, help="The whole log of server and engine.")
def serve(model: str, verbose: bool, no_finetuning: bool, state: Path | None, **chosen: Any) -> None:
    """Serve MODEL, a folder or hf:ORG/NAME, by OpenAI's API."""
    say_log(verbose)
    folder = find_model(model)
    chosen["model_name"] = chosen.pop("name") or short_name(model)
    chosen["http_port"] = chosen.pop("port")
    chosen["adapters"] = dict(chosen["adapters"])
    chosen["state"] = state_folder(state, short_name(model))
    if no_finetuning:
        chosen["finetuning"] = FinetuningPolicy.DISABLED
    settings = settings_of(folder, **chosen)
    say(f"loading {folder}")
    sys.exit(run_server(settings, _say_ready))


def _say_ready(agent: Agent, seconds: float) -> None:
    settings = agent.settings
    host = settings.host if settings.host not in ("0.0.0.0", "::") else "127.0.0.1"
    url = f"http://{host}:{agent.http.port}"
    say(f"ready in {seconds:.1f} s on {agent.engine.device or 'this machine'}: {url}/v1, model {settings.model_name}")
    say(f"jobs and adapters: {settings.state}")
    say(f"metrics: http://{host}:{agent.admin.port}/metrics")
    where = "" if agent.http.port == 8000 else f" --url {url}"
    say(f"try: coserve chat{where}")
