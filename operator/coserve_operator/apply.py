"""Bringing owned objects to the API server: left out while nothing changed, and never over somebody else's object."""

from collections.abc import Callable

from coserve_operator.kube import DEPLOYMENT, KINDS, SECRET, ConflictError, Kube, Manifest, NotFoundError
from coserve_operator.resources.metadata import APPLIED, digest_of, is_owned_by

REFRESH_S = 1800.0
"""An object that nobody seems to have changed is applied again after this time, against what others did to it."""


class ForeignObjectError(Exception):
    """An object of that name exists, and is not ours to change."""


class Applier:
    """Remembers by digest what was applied, so that a reconcile without changes asks the API server nothing."""

    def __init__(self, kube: Kube, clock: Callable[[], float]) -> None:
        self._kube = kube
        self._clock = clock
        self._applied: dict[tuple[str, str, str, str], tuple[str, float]] = {}

    async def apply(self, manifest: Manifest, owner_uid: str) -> Manifest | None:
        """Apply what `owner_uid` owns; return the object when something was sent.

        ForeignObjectError: an object of this name exists that the owner does not control.
        """
        metadata = manifest["metadata"]
        address = (manifest["kind"], metadata["namespace"], metadata["name"], owner_uid)
        digest = digest_of(manifest)
        known = self._applied.get(address)
        if known is not None and known[0] == digest and self._clock() - known[1] < REFRESH_S:
            return None
        if manifest["kind"] == SECRET.name:
            sent = await self._create(manifest)
        else:
            sent = await self._apply(manifest, owner_uid, digest, known is None)
        self._applied[address] = (digest, self._clock())
        return sent

    def forget(self, kind: str, namespace: str, name: str) -> None:
        """Drop what is remembered of an object, since it changed or went."""
        for address in [each for each in self._applied if each[:3] == (kind, namespace, name)]:
            del self._applied[address]

    def forget_owner(self, owner_uid: str) -> None:
        """Drop what is remembered of an owner that is gone."""
        for address in [each for each in self._applied if each[3] == owner_uid]:
            del self._applied[address]

    async def _create(self, manifest: Manifest) -> Manifest | None:
        """Create a Secret. Its content never changes, and we have no right to read it."""
        try:
            return await self._kube.create(manifest)
        except ConflictError:
            return None

    async def _apply(self, manifest: Manifest, owner_uid: str, digest: str, is_first: bool) -> Manifest | None:
        metadata = manifest["metadata"]
        if is_first:
            found = await self._find(manifest)
            if found is not None:
                if not is_owned_by(found, owner_uid):
                    name = f"{manifest['kind']} {metadata['name']}"
                    raise ForeignObjectError(f"{name} exists and is not the endpoint's: rename or delete one of them")
                if found["metadata"].get("annotations", {}).get(APPLIED) == digest and _unchanged(manifest, found):
                    return None
        annotations = {**metadata.get("annotations", {}), APPLIED: digest}
        return await self._kube.apply({**manifest, "metadata": {**metadata, "annotations": annotations}})

    async def _find(self, manifest: Manifest) -> Manifest | None:
        metadata = manifest["metadata"]
        try:
            return await self._kube.get(KINDS[manifest["kind"]], metadata["namespace"], metadata["name"])
        except NotFoundError:
            return None


def _unchanged(manifest: Manifest, found: Manifest) -> bool:
    """Return whether the one field that others like to change is as we want it."""
    if manifest["kind"] != DEPLOYMENT.name:
        return True
    return bool(found["spec"].get("replicas") == manifest["spec"]["replicas"])
