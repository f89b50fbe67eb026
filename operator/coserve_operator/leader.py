"""Leader election by a Lease: one replica works, and stops before another begins when it cannot renew in time.

Each leadership has a fencing token, greater than any before: it stands in the Lease's annotation first, and then with
what the leader writes, so that Redis refuses one that has not noticed its end. Not leaseTransitions: that counts
changes of the holder, for people and other clients, while a token also grows when the same holder begins again, and
leaps where Redis knows a greater one than a Lease that was deleted.
"""

import asyncio
import logging
import math
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from coserve_operator.kube import LEASE, ConflictError, Kube, KubeError, Manifest, NotFoundError

logger = logging.getLogger(__name__)

DURATION_S, RENEW_WITHIN_S, RETRY_S = 15.0, 10.0, 2.0
"""A holder that has not renewed for DURATION_S has lost the Lease; it gives up by itself after RENEW_WITHIN_S."""
TOKEN = "coserve.dev/fencing-token"
DELETED = "whoever held the Lease that was deleted"


class LeadershipLostError(Exception):
    """The Lease could not be renewed in time, or somebody else has it: stop at once."""


class NotLeadingError(KubeError):
    """Something was to be written, and the time for which this replica leads is over."""

    def __init__(self, why: str = "this replica leads no more") -> None:
        super().__init__(0, why)


@dataclass(frozen=True, slots=True)
class Seen:
    """A Lease as this replica saw it change last: `at` by its own monotonic clock, since clocks of machines differ."""

    uid: str
    holder: str
    renewed: str
    duration_s: float
    at: float


def may_take(seen: Seen, identity: str, now: float) -> bool:
    """Return whether the Lease is ours, free, or has not been renewed for the duration that stands in it."""
    return seen.holder in ("", identity) or now - seen.at >= seen.duration_s


def observe(lease: Manifest, before: Seen | None, now: float) -> Seen:
    """Return the Lease as seen now; the time of the last change stays while nothing changes.

    One that was made anew is free only after its duration, unless somebody had it and gave it back: the holder of the
    one before may not know yet.
    """
    spec = lease.get("spec") or {}
    uid, holder, renewed = lease["metadata"].get("uid", ""), spec.get("holderIdentity") or "", spec.get("renewTime")
    if before is not None and not holder and not renewed and (before.uid != uid or before.holder == DELETED):
        holder = DELETED
    seen = Seen(uid, holder, renewed or "", float(spec.get("leaseDurationSeconds") or DURATION_S), now)
    return before if before is not None and replace(seen, at=before.at) == before else seen


def token_of(lease: Manifest) -> int:
    """Return the greatest token that was taken; 0 where none is known."""
    text = (lease["metadata"].get("annotations") or {}).get(TOKEN, "")
    return int(text) if text.isascii() and text.isdigit() else 0


class Leader:
    """Holds the Lease `name`, which it makes where there is none. Times are those of the event loop's clock."""

    def __init__(self, kube: Kube, namespace: str, name: str, identity: str) -> None:
        self._kube, self._namespace, self._name, self._identity = kube, namespace, name, identity
        self._seen: Seen | None = None
        self._until = -math.inf
        self._token = self._sent = 0
        self._led, self._end = False, f"the Lease could not be renewed for {RENEW_WITHIN_S:.0f} s"
        self._writing = asyncio.Lock()
        self.trouble = ""
        """Why the Lease can be neither read nor written, in the words of the API server."""

    def token(self) -> int:
        """Return the fencing token for a write that begins now; NotLeadingError when the leadership is over."""
        if _now() >= self._until:
            raise NotLeadingError
        return self._token

    async def acquire(self) -> None:
        """Wait until the Lease is ours."""
        logger.info("%s waits for Lease %s/%s", self._identity, self._namespace, self._name)
        while True:
            try:
                async with asyncio.timeout(RENEW_WITHIN_S):
                    if await self._try():
                        break
            except TimeoutError:
                logger.warning("the Lease could not be asked for in %.0f s", RENEW_WITHIN_S)
            await asyncio.sleep(RETRY_S)
        logger.info("%s leads, with the fencing token %d", self._identity, self._token)

    async def hold(self) -> None:
        """Renew for ever; LeadershipLostError when that failed for too long, whatever call hangs."""
        while True:
            try:
                async with asyncio.timeout_at(self._until):
                    await asyncio.sleep(RETRY_S)
                    await self._renew()
            except TimeoutError:
                if _now() >= self._until:
                    raise LeadershipLostError(self._end) from None

    async def raise_above(self, token: int) -> None:
        """Take a token greater than this one, which stands in a Redis, into the Lease; NotLeadingError where it is
        another's.
        """
        try:
            async with asyncio.timeout_at(self._until):
                if self.token() <= token:
                    await self._renew(token)
        except (TimeoutError, LeadershipLostError) as error:
            raise NotLeadingError(str(error) or "the Lease could not be renewed in time") from None

    async def release(self) -> None:
        """Let the next one begin at once. Only ever called when nothing of ours runs any more."""
        self._until = -math.inf
        try:
            lease = await self._kube.get(LEASE, self._namespace, self._name)
            if (lease.get("spec") or {}).get("holderIdentity") == self._identity:
                lease["spec"]["holderIdentity"] = ""
                await self._kube.replace(_typed(lease))
        except KubeError as error:
            logger.warning("the Lease could not be released: %s", error)

    async def _renew(self, above: int = 0) -> None:
        while True:
            if await self._try(above):
                return
            await asyncio.sleep(RETRY_S)

    async def _try(self, above: int = 0) -> bool:
        """Take or renew the Lease once, under a token greater than `above`; LeadershipLostError where it was ours and
        is another's.
        """
        async with self._writing:
            try:
                lease = await self._read()
                self._seen = observe(lease, self._seen, _now())
                if not self._is_ours(lease):
                    self.trouble = ""
                    return False
                token = self._next_token(token_of(lease), above)
                self._sent, sent_at = max(self._sent, token), _now()
                written = await self._kube.replace(_typed(self._taken(lease, token)))
            except ConflictError:
                return False
            except KubeError as error:
                logger.warning("the Lease could not be renewed: %s", error)
                self.trouble = f"Lease {self._namespace}/{self._name}: {error}"
                return False
            self.trouble = ""
            self._seen = observe(written, self._seen, _now())
            self._led, self._token, self._until = True, token, sent_at + RENEW_WITHIN_S
            return True

    def _is_ours(self, lease: Manifest) -> bool:
        assert self._seen is not None
        if not self._led:
            return may_take(self._seen, self._identity, _now())
        holder = (lease.get("spec") or {}).get("holderIdentity") or ""
        if _now() < self._until:
            if holder in ("", self._identity) and token_of(lease) <= self._sent:
                return True
            self._until = -math.inf
            self._end = f"{'another of our name' if holder == self._identity else holder} holds the Lease now"
        raise LeadershipLostError(self._end)

    def _next_token(self, held: int, above: int) -> int:
        ours = max(self._token, held)
        return ours if self._led and ours > above else max(held, self._sent, above) + 1

    async def _read(self) -> Manifest:
        try:
            return await self._kube.get(LEASE, self._namespace, self._name)
        except NotFoundError:
            self._seen = self._seen or Seen("", "", "", DURATION_S, _now())
            metadata = {"name": self._name, "namespace": self._namespace}
            return await self._kube.create(_typed({"metadata": metadata, "spec": {}}))

    def _taken(self, lease: Manifest, token: int) -> Manifest:
        spec = lease.get("spec") or {}
        moment = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        changed = spec.get("holderIdentity") != self._identity
        metadata = lease["metadata"]
        lease["metadata"] = metadata | {"annotations": (metadata.get("annotations") or {}) | {TOKEN: str(token)}}
        lease["spec"] = {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": int(DURATION_S),
            "acquireTime": moment if changed else spec.get("acquireTime", moment),
            "renewTime": moment,
            "leaseTransitions": spec.get("leaseTransitions", 0) + (1 if changed else 0),
        }
        return lease


def _now() -> float:
    return asyncio.get_running_loop().time()


def _typed(lease: Manifest) -> Manifest:
    return {**lease, "apiVersion": LEASE.api_version, "kind": LEASE.name}
