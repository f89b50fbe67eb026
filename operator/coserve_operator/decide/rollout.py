"""When agents are replaced: at once for what the endpoint's author changed, in turns for what a new version of ours
changes, and not at all for fewer jobs.
"""

from coserve_api.endpoint import InferenceEndpoint
from coserve_operator.decide.observed import RolloutView


def jobs_at_start(endpoint: InferenceEndpoint, made_from: str, before: RolloutView | None) -> int:
    """Return for how many jobs agents are started, which is what they keep memory for. Those that were started for more
    are not restarted for fewer: the placement sees to that; for more than they were started for they are.
    """
    wanted = endpoint.spec.finetuning.jobs
    return max(wanted, before.jobs) if before is not None and before.made_from == made_from else wanted


def needs_turn(made_from: str, builder: str, before: RolloutView | None) -> bool:
    """Return whether agents that serve would be replaced for what this version of the operator, or its settings, do
    otherwise than those that made the Deployment.
    """
    return before is not None and before.serves and before.made_from != made_from and before.builder != builder
