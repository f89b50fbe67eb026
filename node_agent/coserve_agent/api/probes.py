"""What those ask who watch an agent: whether it answers, how much it has to do, and what it is."""

from __future__ import annotations

from fastapi import FastAPI

from coserve_agent.generation.generator import Generator


def add(app: FastAPI, generator: Generator, version: str) -> None:
    """Let `app` answer them."""

    @app.get("/health")
    @app.get("/ping")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/load")
    async def load() -> dict[str, int]:
        """Requests that are being answered, as vLLM counts them."""
        return {"server_load": generator.in_flight}

    @app.get("/version")
    async def show_version() -> dict[str, str]:
        return {"version": version}
