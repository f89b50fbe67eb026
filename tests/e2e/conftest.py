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
    try:
        made.script("deploy")
        yield made
    finally:  # also of one that did not come up: it would run on beside all other tests
        made.script("cluster", "down")
