"""A store for each tenant: a connection, a server and its faults of its own, so that none is felt by another."""

import logging
from collections.abc import Callable, Iterable

from coserve_operator.redis.bounded import connect_bounded
from coserve_operator.redis.store import Leadership, OperatorStore
from coserve_operator.settings import Settings
from coserve_operator.tenants import PLACE, RedisAccess, access_digest, redis_password, redis_url
from coserve_operator.tls import NO_TLS, RedisTls

logger = logging.getLogger(__name__)

REFERENCE = "reference"
"""The namespace and the uid of an endpoint that never was."""


class Stores:
    """Hands out the store of a namespace: each has its own where `redis_url` has a place for its name, else all have
    the same one. `clock` is monotonic.
    """

    def __init__(
        self, settings: Settings, leadership: Leadership, clock: Callable[[], float], tls: RedisTls = NO_TLS
    ) -> None:
        self._settings, self._leadership, self._clock, self._tls = settings, leadership, clock, tls
        self._own = PLACE in settings.redis_url
        self._stores: dict[str, OperatorStore] = {}
        key = settings.endpoint_key.get_secret_value() or settings.password or ""
        if not key:
            logger.warning("COSERVE_ENDPOINT_KEY is empty: the endpoints' Redis passwords can be guessed")
        self._key, self._previous = key.encode(), settings.endpoint_key_previous.get_secret_value().encode()
        if settings.shared_user:
            logger.warning("all endpoints have the operator's own Redis user: each can read and change what all hold")

    def of(self, namespace: str) -> OperatorStore:
        """Return the store of a namespace; nothing is connected yet."""
        tenant = self.tenant(namespace)
        if tenant not in self._stores:
            self._stores[tenant] = self._connect(namespace)
        return self._stores[tenant]

    def tenant(self, namespace: str) -> str:
        """Return the name under which a namespace has its store; those that share one have the same."""
        return namespace if self._own else ""

    def all(self) -> Iterable[OperatorStore]:
        """Return those that were handed out."""
        return tuple(self._stores.values())

    def access(self, namespace: str, uid: str) -> RedisAccess:
        """Return how the agents and feeders of an endpoint reach Redis."""
        username, password = self.of(namespace).credentials(uid)
        return self._access(namespace, username, password)

    def reference(self) -> RedisAccess:
        """Return an access that differs when that of every endpoint does."""
        store = self._connect(REFERENCE)
        return self._access(REFERENCE, *store.credentials(REFERENCE))

    async def drop(self, namespace: str) -> None:
        """Forget a namespace whose Redis goes."""
        store = self._stores.pop(namespace, None)
        if store is not None:
            await store.redis.aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        for store in self.all():
            await store.redis.aclose()

    def _access(self, namespace: str, username: str, password: str) -> RedisAccess:
        url, ca = redis_url(self._settings.redis_url_of_agents, namespace), self._tls.ca
        return RedisAccess(url, username, password, ca, access_digest(self._key, url, username, password, ca))

    def _connect(self, namespace: str) -> OperatorStore:
        settings = self._settings
        username, password = settings.redis_username, settings.password
        if self._own:
            username, password = None, redis_password(password or "", namespace)
        return OperatorStore(
            connect_bounded(redis_url(settings.redis_url, namespace), username, password, self._tls.ca),
            self._key,
            self._clock,
            settings.metrics_password.get_secret_value(),
            self._leadership,
            previous_key=self._previous,
            shared_user=(username or "default", password or "") if settings.shared_user else None,
        )
