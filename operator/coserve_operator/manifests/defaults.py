"""What a platform gives every pod of agents and feeders: under what the endpoint's template says, never over it."""

from typing import Any

from coserve_operator.kube import Manifest
from coserve_operator.settings import PodDefaults


def with_pod_defaults(manifest: Manifest, defaults: PodDefaults, *, spread: bool = False) -> Manifest:
    """Return the Deployment or Job with `defaults` in its pod template; `spread`: its pods are many, so that the
    topology spread constraints are for them.
    """
    template = manifest["spec"]["template"]
    metadata, pod = template["metadata"], template["spec"]
    merged: dict[str, Any] = {**pod}
    for name, key in (("imagePullSecrets", "image_pull_secrets"), ("tolerations", "tolerations")):
        together = [*pod.get(name, ()), *getattr(defaults, key)]
        merged[name] = [each for number, each in enumerate(together) if each not in together[:number]]
    merged["nodeSelector"] = defaults.node_selector | pod.get("nodeSelector", {})
    for name, value in (
        ("affinity", defaults.affinity),
        ("priorityClassName", defaults.priority_class_name),
        ("runtimeClassName", defaults.runtime_class_name),
    ):
        merged[name] = pod.get(name) or value
    if spread and defaults.topology_spread_constraints:
        selector = {"labelSelector": {"matchLabels": metadata["labels"]}}
        merged["topologySpreadConstraints"] = [selector | each for each in defaults.topology_spread_constraints]
    told = {name: {**getattr(defaults, name), **metadata.get(name, {})} for name in ("labels", "annotations")}
    template = {"metadata": metadata | {name: each for name, each in told.items() if each}}
    template["spec"] = {name: value for name, value in merged.items() if value != {} and value != [] and value != ""}
    return {**manifest, "spec": {**manifest["spec"], "template": template}}
