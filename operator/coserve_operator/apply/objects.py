"""Bringing owned objects to the API server: left out while nothing changed, and never over somebody else's object."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from coserve_operator.apply.drift import Drifts
from coserve_operator.apply.hindrances import ForeignObjectError
from coserve_operator.apply.ownership import Fields, owned_fields, taken_by
from coserve_operator.decide.observed import Drift
from coserve_operator.decide.obstacles import foreign
from coserve_operator.kube import KINDS, SECRET, ConflictError, Kube, Manifest, NotFoundError
from coserve_operator.manifests.metadata import digest_of, is_leaving, is_owned_by

REFRESH_S = 1800.0
"""An object that nobody seems to have changed is applied again after this time, against what no watch has shown."""

LOOK_S = 300.0
"""A Secret is created again after this time: nobody may have deleted it, but we may not look."""

Address = tuple[str, str, str]
"""Kind, namespace, name."""


@dataclass
class _Applied:
    """What was applied last, for whom. `fields` are those that were ours then, of the object's `version`; `taken` says
    that others have changed some since.
    """

    owner: str
    owner_uid: str
    digest: str
    at: float
    uid: str = ""
    version: int = 0
    fields: Fields = frozenset()
    taken: bool = False


class Applier:
    """Remembers what was applied, so that a reconcile without changes asks the API server nothing."""

    def __init__(self, kube: Kube, clock: Callable[[], float]) -> None:
        self._kube = kube
        self._clock = clock
        self._applied: dict[Address, _Applied] = {}
        self._sending: dict[Address, Manifest | None] = {}
        """What is being applied, with the newest that a watch has shown of it meanwhile."""
        self._drifts = Drifts(clock)

    async def apply(self, manifest: Manifest, owner_uid: str) -> Manifest | None:
        """Apply what `owner_uid` owns; return the object when something was sent.

        ForeignObjectError: an object of this name exists that the owner does not control.
        """
        address, digest = _address(manifest), digest_of(manifest)
        known = self._applied.get(address)
        if known is not None and known.owner_uid != owner_uid:
            known = None
        if known is not None and known.digest == digest and not self._due(known, address):
            return None
        self._sending[address] = None
        try:
            sent = await self._send(manifest, owner_uid, known)
        finally:
            seen = self._sending.pop(address)
        applied = _Applied(manifest["metadata"]["ownerReferences"][0]["name"], owner_uid, digest, self._clock())
        if sent is not None:
            applied.uid, applied.version = sent["metadata"].get("uid", ""), _version(sent)
            applied.fields = owned_fields(sent)
        self._applied[address] = applied
        if seen is not None and self.observe(manifest["kind"], seen) is not None:
            return await self.apply(manifest, owner_uid) or sent
        return sent

    def observe(self, kind: str, body: Manifest) -> str | None:
        """Take an object as a watch shows it; return its owner's name when somebody else changed fields of ours."""
        address = kind, body["metadata"]["namespace"], body["metadata"]["name"]
        if address in self._sending:
            self._sending[address] = body  # looked at when the answer has come, which says what is ours
            return None
        known = self._applied.get(address)
        if known is None or _version(body) <= known.version or body["metadata"].get("uid") != known.uid:
            return None
        known.version = _version(body)
        lost = known.fields - owned_fields(body)
        if not lost:
            return None
        known.fields -= lost
        known.taken = True
        self._drifts.note(known.owner_uid, _what(address), lost, taken_by(body, lost))
        return known.owner

    def insisted(self, owner_uid: str) -> tuple[Drift, ...]:
        """Return the objects of an owner of which somebody changes the same field again and again."""
        return self._drifts.insisted(owner_uid)

    def forget(self, kind: str, namespace: str, name: str) -> None:
        """Drop what is remembered of an object, since it went."""
        self._applied.pop((kind, namespace, name), None)

    def forget_owner(self, owner_uid: str) -> None:
        """Drop what is remembered of an owner that is gone."""
        self._drifts.forget(owner_uid)
        for address in [each for each, applied in self._applied.items() if applied.owner_uid == owner_uid]:
            del self._applied[address]

    def _due(self, known: _Applied, address: Address) -> bool:
        """Return whether to apply the same again: what others took is to be taken back, or it was long ago."""
        taken_back = known.taken and not self._drifts.wait_s(known.owner_uid, _what(address))
        refresh_s = LOOK_S if address[0] == SECRET.name else REFRESH_S
        return taken_back or self._clock() - known.at >= refresh_s

    async def _create(self, manifest: Manifest) -> Manifest | None:
        """Create a Secret. Its content never changes, and we have no right to read it."""
        try:
            return await self._kube.create(manifest)
        except ConflictError:
            return None

    async def _send(self, manifest: Manifest, owner_uid: str, known: _Applied | None) -> Manifest | None:
        if manifest["kind"] == SECRET.name:
            return await self._create(manifest)
        if known is not None:
            with suppress(ConflictError):  # another has come in its place
                return await self._kube.apply(_over(manifest, known.uid))
        return await self._kube.apply(_over(manifest, await self._uid(manifest, owner_uid)))

    async def _uid(self, manifest: Manifest, owner_uid: str) -> str:
        """Return the uid of the object, "" where there is none yet."""
        kind, namespace, name = _address(manifest)
        try:
            found = await self._kube.get(KINDS[kind], namespace, name)
        except NotFoundError:
            return ""
        if not is_owned_by(found, owner_uid):
            raise ForeignObjectError(foreign(kind, name, "the endpoint's", leaving=is_leaving(found)))
        return str(found["metadata"].get("uid", ""))


def _over(manifest: Manifest, uid: str) -> Manifest:
    """A manifest that is applied over the object of this uid alone, where there is one."""
    return {**manifest, "metadata": {**manifest["metadata"], "uid": uid}} if uid else manifest


def _address(manifest: Manifest) -> Address:
    return manifest["kind"], manifest["metadata"]["namespace"], manifest["metadata"]["name"]


def _what(address: Address) -> str:
    return f"{address[0]} {address[2]}"


def _version(body: Manifest) -> int:
    return int(body["metadata"].get("resourceVersion") or 0)
