"""Writing the status of an object of ours: over the version that was decided on, and then into the picture."""

from typing import Any

from coserve_api.common import ObjectMeta
from coserve_operator.budget import StatusBudget
from coserve_operator.kube import Kind, Kube, NotFoundError
from coserve_operator.world import World


async def write_status(
    kube: Kube, world: World, budget: StatusBudget, kind: Kind, meta: ObjectMeta, status: dict[str, Any]
) -> bool:
    """Return False when the object is gone.

    ConflictError: it has changed since it was read.
    """
    manifest = {
        "apiVersion": kind.api_version,
        "kind": kind.name,
        "metadata": {"name": meta.name, "namespace": meta.namespace, "resourceVersion": meta.resource_version},
        "status": status,
    }
    try:
        written = await kube.apply(manifest, "status")
    except NotFoundError:
        world.remove(kind, (meta.namespace, meta.name))
        return False
    budget.written(meta.uid)
    world.put(kind, written)
    return True
