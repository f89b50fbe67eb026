"""`coserve plan MODEL`."""

from __future__ import annotations

import sys

import click

from coserve_api.common import ConcurrentJobs, Rank
from coserve_api.job import TargetModule
from coserve_cli.console import size
from coserve_cli.models import find_model, short_name
from coserve_cli.options import Checked, MemorySize, names
from coserve_cli.planning import Fit, adapter_bytes, fits, kept_bytes, lengths_of, settled
from coserve_engine.config import LINEARS
from coserve_engine.errors import EngineError
from coserve_engine.formats.model_folder import read_model_config
from coserve_engine.hardware import CPU, CUDA, Hardware, find_gpu, this_cpu
from coserve_engine.job_messages import LoraSpec
from coserve_engine.memory import weight_values

HOPPER = (9, 0)


@click.command(
    epilog="Nothing is loaded: the sizes follow from config.json, as the engine's own do. Training keeps what backward "
    "needs of each layer; under --activation-memory it keeps less, and computes the rest again, to the same bits. Exit "
    "status: 1 where no length fits."
)
@click.argument("model")
@click.option(
    "--device", type=click.Choice(["auto", CPU, CUDA]), default="auto", show_default=True, help="To plan for."
)
@click.option("--memory", type=MemorySize(), help="Of a device that is not here.  [default: this machine's]")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", show_default=True)
@click.option("--rank", type=Checked("rank", Rank), default=16, show_default=True, help="Of the adapter.")
@click.option("--target", "targets", type=names(TargetModule), multiple=True, help="May be repeated.  [default: all 7]")
@click.option("--jobs", type=Checked("jobs", ConcurrentJobs), default=1, show_default=True, help="That train at once.")
@click.option("--no-finetuning", is_flag=True, help="Serving alone.")
@click.option("--activation-memory", "budget", type=MemorySize(), help="A pass may keep.  [default: everything]")
@click.option("--kv-cache-memory", "kv_bytes", type=MemorySize(), help="[default: 256Mi; what a GPU has left]")
@click.option("--length", "lengths", type=click.IntRange(16), multiple=True, help="Instead of powers of two.")
def plan(
    model: str,
    device: str,
    memory: int | None,
    dtype: str,
    rank: int,
    targets: tuple[str, ...],
    jobs: int,
    no_finetuning: bool,
    budget: int | None,
    kv_bytes: int | None,
    lengths: tuple[int, ...],
) -> None:
    """Show how much memory MODEL takes to serve and to finetune, and which lengths fit."""
    folder = find_model(model)
    jobs = 0 if no_finetuning else jobs
    adapter = LoraSpec(rank, 2.0 * rank, tuple(name for name in LINEARS if not targets or name in targets))
    try:
        shape = read_model_config(folder)
        hardware = _hardware(device, memory)
        wanted = lengths or tuple(lengths_of(shape))
        configs = [settled(folder, hardware, dtype, rank, budget, jobs, length) for length in wanted]
    except EngineError as error:
        raise click.ClickException(str(error)) from None
    dtype = configs[0].dtype
    found = fits(shape, configs, hardware, adapter, kv_bytes, jobs)
    click.echo(
        f"{short_name(model)}: {weight_values(shape):,} parameters, {shape.layers} layers, at most "
        f"{shape.max_positions:,} tokens; {dtype} on {hardware}"
    )
    longest = next((fit for fit in reversed(found) if fit.plan is not None), None)
    if longest is not None and longest.plan is not None:
        click.echo(f"\nat {longest.length:,} tokens")
        for part in longest.plan.parts:
            click.echo(f"  {part.name:<34} {size(part.bytes):>12}")
        click.echo(f"  {'KV cache':<34} {size(longest.plan.kv_bytes):>12}")
        left = hardware.free_bytes - sum(part.bytes for part in longest.plan.parts) - longest.plan.kv_bytes
        click.echo(f"  {'left':<34} {size(max(0, left)):>12}")
    if jobs:
        kept = kept_bytes(shape, adapter, dtype)
        click.echo(f"\nfinetuning at rank {rank} on {', '.join(adapter.targets)}")
        click.echo(f"  adapter, gradient, AdamW {size(adapter_bytes(shape, adapter, dtype)):>22}")
        click.echo("  kept of a token in a layer, bytes")
        click.echo(f"    here                   {kept.everything:>10,}   at least {kept.least:,}")
        click.echo(
            f"    transformers and PEFT  {kept.autograd:>10,}   with gradient checkpointing {kept.checkpointing:,}"
        )
    _table(found, bool(jobs))
    sys.exit(0 if longest is not None else 1)


def _hardware(device: str, memory: int | None) -> Hardware:
    """The device to plan for: this machine's, or one of which only the memory is known."""
    if memory is not None:
        if device == CUDA:
            return Hardware(CUDA, "a GPU", memory, memory, HOPPER)
        return Hardware(CPU, "a CPU", memory, memory)
    if device == CPU:
        return this_cpu()
    gpu = find_gpu()
    if isinstance(gpu, Hardware):
        return gpu
    if device == CUDA:
        raise click.UsageError(f"--device is cuda, and torch can use no GPU here: {gpu}; say what it has with --memory")
    return this_cpu()


def _table(found: list[Fit], trains: bool) -> None:
    click.echo()
    head = f"{'length':>9} {'serves at once':>15}"
    head += f" {'a sample keeps':>15} {'recomputed':>11} {'autograd':>10} {'checkpointing':>14}" if trains else ""
    click.echo(head)
    for fit in found:
        row = f"{fit.length:>9,} " + (f"{fit.sequences:>15,}" if fit.plan is not None else f"{'does not fit':>15}")
        if trains:
            layers = f"{fit.recomputed_layers} layers" if fit.recomputed_layers else "-"
            row += f" {size(fit.kept_bytes):>15} {layers:>11} {size(fit.autograd_bytes):>10}"
            row += f" {size(fit.checkpointing_bytes):>14}"
        click.echo(row)
    for fit in found:
        if fit.refused:
            click.echo(f"\n{fit.length:,}: {fit.refused}")
            break
