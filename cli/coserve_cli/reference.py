"""docs/cli.md: what each command says of itself. `python -m coserve_cli.reference >docs/cli.md` writes it."""

from __future__ import annotations

import importlib

import click

from coserve_cli.main import COMMANDS, main

WIDTH = 100
HEAD = """# `coserve`: one machine, one command

For whoever has a laptop or one GPU and no Kubernetes. This page is what the commands say of themselves; it is written
by `python -m coserve_cli.reference`, and a test holds it to the code. How they are used together stands in
[finetuning.md](finetuning.md) and [serving.md](serving.md).

Completion: `eval "$(_COSERVE_COMPLETE=bash_source coserve)"` in bash; `zsh_source` and `fish_source` for the others.

Exit status: 0 it is done, 1 it could not be done (the last line says why), 2 what was typed is wrong, 130 Ctrl-C; but
Ctrl-C is how `serve` ends (0), and `bench` then says what it has seen (1).
"""


def reference() -> str:
    """The page."""
    parts = [HEAD]
    for name in COMMANDS:
        command: click.Command = getattr(importlib.import_module(f"coserve_cli.commands.{name}"), name)
        context = click.Context(command, parent=click.Context(main, info_name="coserve"), info_name=name)
        context.terminal_width = WIDTH
        parts.append(f"## coserve {name}\n```\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    click.echo(reference(), nl=False)
