"""Leader election by a Lease: one replica works, and stops before another begins when it cannot renew in time."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from coserve_operator.kube import LEASE, ConflictError, Kube, KubeError, Manifest, NotFoundError

logger = logging.getLogger(__name__)

DURATION_S, RENEW_WITHIN_S, RETRY_S = 15.0, 10.0, 2.0
"""A holder that has not renewed for DURATION_S has lost the Lease; it gives up by itself after RENEW_WITHIN_S."""


class LeadershipLostError(Exception):
    """The Lease could not be renewed in time, or somebody else has it: stop at once."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A Lease as this replica saw it change last: `at` by its own monotonic clock, since clocks of machines differ."""

    holder: str
    renewed: str
    at: float


def may_take(seen: Seen, identity: str, now: float) -> bool:
    """Return whether the Lease is ours, free, or has not been renewed for its duration."""
    return seen.holder in ("", identity) or now - seen.at >= DURATION_S


def observe(lease: Manifest, before: Seen | None, now: float) -> Seen:
    """Return the Lease as seen now; the time of the last change stays while nothing changes."""
    spec = lease.get("spec") or {}
    holder, renewed = spec.get("holderIdentity") or "", spec.get("renewTime") or ""
    if before is not None and (before.holder, before.renewed) == (holder, renewed):
        return before
    return Seen(holder, renewed, now)


class Leader:
    """Holds the Lease `name`, which the chart makes beforehand."""

    def __init__(
        self,
        kube: Kube,
        namespace: str,
        name: str,
        identity: str,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._kube, self._namespace, self._name, self._identity = kube, namespace, name, identity
        self._clock, self._sleep = clock, sleep
        self._seen: Seen | None = None

    async def acquire(self) -> None:
        """Wait until the Lease is ours."""
        logger.info("%s waits for Lease %s/%s", self._identity, self._namespace, self._name)
        while not await self._try():
            await self._sleep(RETRY_S)
        logger.info("%s leads", self._identity)

    async def hold(self) -> None:
        """Renew for ever; LeadershipLostError when that failed for too long."""
        renewed = self._clock()
        while True:
            await self._sleep(RETRY_S)
            if await self._try():
                renewed = self._clock()
            elif self._seen is not None and self._seen.holder != self._identity:
                raise LeadershipLostError(f"{self._seen.holder or 'nobody'} holds the Lease now")
            elif self._clock() - renewed >= RENEW_WITHIN_S:
                raise LeadershipLostError(f"the Lease could not be renewed for {RENEW_WITHIN_S:.0f} s")

    async def release(self) -> None:
        """Let the next one begin at once. Only ever called when nothing of ours runs any more."""
        try:
            lease = await self._kube.get(LEASE, self._namespace, self._name)
            if (lease.get("spec") or {}).get("holderIdentity") == self._identity:
                lease["spec"]["holderIdentity"] = ""
                await self._kube.replace(_typed(lease))
        except KubeError as error:
            logger.warning("the Lease could not be released: %s", error)

    async def _try(self) -> bool:
        try:
            lease = await self._read()
            self._seen = observe(lease, self._seen, self._clock())
            if not may_take(self._seen, self._identity, self._clock()):
                return False
            written = await self._kube.replace(_typed(self._taken(lease)))
        except ConflictError:
            return False
        except KubeError as error:
            logger.warning("the Lease could not be renewed: %s", error)
            return False
        self._seen = observe(written, self._seen, self._clock())
        return True

    async def _read(self) -> Manifest:
        try:
            return await self._kube.get(LEASE, self._namespace, self._name)
        except NotFoundError:
            metadata = {"name": self._name, "namespace": self._namespace}
            return await self._kube.create(_typed({"metadata": metadata, "spec": {}}))

    def _taken(self, lease: Manifest) -> Manifest:
        spec = lease.get("spec") or {}
        moment = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        changed = spec.get("holderIdentity") != self._identity
        lease["spec"] = {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": int(DURATION_S),
            "acquireTime": moment if changed else spec.get("acquireTime", moment),
            "renewTime": moment,
            "leaseTransitions": spec.get("leaseTransitions", 0) + (1 if changed else 0),
        }
        return lease


def _typed(lease: Manifest) -> Manifest:
    return {**lease, "apiVersion": LEASE.api_version, "kind": LEASE.name}
