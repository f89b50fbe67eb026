"""`coserve COMMAND`. Commands are imported when they are called, so that --help and completion answer at once.

Exit status: 0 it is done, 1 it could not be done (the message says why), 2 what was typed is wrong, 130 Ctrl-C.
"""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import version
from typing import Any

import click

from coserve_cli.needs import require_agent
from coserve_cli.statuses import INTERRUPTED

COMMANDS = {
    "serve": "Serve a model by OpenAI's API; it trains, too.",
    "finetune": "Train a LoRA adapter on a data set, in a server that runs or in one of its own.",
    "data": "Show what a job would make of a data set: tokens, which are learned, lines that cannot be used.",
    "chat": "Talk to a model that is served.",
    "bench": "Send a server requests at a rate, and see what its clients see.",
    "export": "Write an adapter, or the model with it merged in, as a plain Hugging Face folder.",
    "plan": "How much memory serving and finetuning a model take, and which lengths and batches fit.",
}
"""Name -> what it is for. The module coserve_cli.commands.NAME has it as `NAME`."""


class _Commands(click.Group):
    """Its commands' modules are imported when they are needed. Ctrl-C ends with INTERRUPTED; click's own is 1."""

    def main(self, *args: Any, **more: Any) -> Any:
        try:
            status = super().main(*args, **{**more, "standalone_mode": False})
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except click.Abort:
            click.echo("broken off", err=True)
            sys.exit(INTERRUPTED)
        sys.exit(status if isinstance(status, int) else 0)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        if not ctx.resilient_parsing:
            require_agent(cmd_name)
        module = importlib.import_module(f"coserve_cli.commands.{cmd_name}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list, without an import of any of them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(version("coserve"), message="coserve %(version)s")
def main() -> None:
    """Serve a language model and finetune it in the same process, on one machine."""


if __name__ == "__main__":
    main(prog_name="coserve")
