"""Whether the packages of the agent are installed: `coserve` itself is a small package without them."""

from __future__ import annotations

from importlib.util import find_spec

import click

AGENT = ("fastapi", "httpx", "rich", "torch", "transformers")
"""Of the extra `agent`, what tells whether it was asked for."""


def require_agent(command: str) -> None:
    """Raises click.ClickException where the extra is not installed."""
    missing = [name for name in AGENT if find_spec(name) is None]
    if missing:
        raise click.ClickException(
            f"coserve {command} needs the agent's packages, and {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not installed; install them with: "
            "pipx install --force 'coserve[agent]' (or pip install 'coserve[agent]')"
        )
