"""A name that clients may send as `model`, and what is known of one that is not served yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from coserve_engine.messages import AdapterVersion


@dataclass(frozen=True)
class Served:
    """A name that clients may send as `model`. `root` says where the weights are from; `version` None is the base
    model. `variables` are the chat template's, where a request does not say.
    """

    name: str
    version: AdapterVersion | None
    root: str
    created_s: int
    parent: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Unloaded:
    """A name that should be served: its version did not load, or has not been loaded yet."""

    failed: bool
    retry_after_s: int


class Models(Protocol):
    """The names that are served now."""

    def resolve(self, name: str) -> Served | None: ...

    async def bring(self, name: str, within_s: float) -> Served | None:
        """What a request runs on that begins now, and keeps until it lets it go.

        Raises:
            TimeoutError: it is served, and is not loaded within that time.
        """
        ...

    def let_go(self, served: Served) -> None: ...

    def unloaded(self, name: str) -> Unloaded | None:
        """What is known of a published name that `resolve` does not find."""
        ...

    def listing(self) -> list[Served]:
        """The base model first."""
        ...
