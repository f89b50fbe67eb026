"""The development cluster with coserve on it, made once and taken away at the end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from system import Cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The cluster with coserve installed."""
    made = Cluster()
    made.script("cluster", "down")
    made.script("deploy")
    yield made
    made.script("cluster", "down")
