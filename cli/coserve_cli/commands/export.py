"""`coserve export ADAPTER --merge DIR`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import click

from coserve_cli.console import say
from coserve_cli.models import find_model
from coserve_engine.errors import EngineError
from coserve_engine.formats.adapter_config import ADAPTER_CONFIG
from coserve_engine.formats.folders import MANIFEST
from coserve_engine.formats.merging import merge


@click.command(
    epilog="ADAPTER is a folder in PEFT's format, such as a version that a job published. The model that it was trained"
    " on is named in its adapter_config.json; --model says where it is instead."
)
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--merge", "merged", type=click.Path(path_type=Path), help="Write the model with the adapter merged in.")
@click.option("--to", "copied", type=click.Path(path_type=Path), help="Write the adapter alone, in PEFT's format.")
@click.option("--model", help="The base model: a folder, or hf:ORG/NAME.")
def export(adapter: Path, merged: Path | None, copied: Path | None, model: str | None) -> None:
    """Write an adapter as a plain Hugging Face folder, alone or merged into its model."""
    if (merged is None) == (copied is None):
        raise click.UsageError("say where to write: --merge DIR for the merged model, or --to DIR for the adapter")
    if not (adapter / ADAPTER_CONFIG).is_file():
        raise click.UsageError(f"{adapter}: no {ADAPTER_CONFIG} there; name the folder of an adapter in PEFT's format")
    target = merged or copied
    assert target is not None
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise click.UsageError(f"{target} is there and not empty; name a new folder")
    try:
        if merged is None:
            shutil.copytree(adapter, target, ignore=shutil.ignore_patterns(MANIFEST), dirs_exist_ok=True)
            click.echo(str(target))
            return
        base = find_model(model or _base_of(adapter))
        changed = merge(base, adapter, merged, lambda name, number, of: say(f"{name} ({number} of {of})"))
    except (EngineError, OSError) as error:
        raise click.ClickException(str(error)) from None
    say(f"{changed} linears of {base} changed")
    click.echo(str(merged))


def _base_of(adapter: Path) -> str:
    """The model that an adapter's folder names, as `find_model` reads it."""
    try:
        name = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        name = None
    if not isinstance(name, str) or not name:
        raise click.UsageError(f"{adapter / ADAPTER_CONFIG} names no base model; say where it is with --model")
    return name if Path(name).is_dir() else f"hf:{name}"
