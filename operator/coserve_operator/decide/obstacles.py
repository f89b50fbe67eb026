"""What stands in the way of an object that we need, in the words of a condition: the one place where it is named."""

import re

from coserve_operator.decide.observed import Obstacle

LONGEST_MESSAGE = 1000
"""A plan of memory that does not fit names every part and every remedy."""
_GENERATED = re.compile(r'pods "([^"]*)-[a-z0-9]{5}"')

_KINDS = {
    "QuotaExceeded": ("exceeded quota", "failed quota"),
    "PodSecurityViolated": ("violates PodSecurity",),
    "LimitRangeExceeded": ("usage per Container is", "usage per Pod is", "limit to request ratio per"),
}
"""Reasons by what the API server's own admission plugins say (k8s.io/kubernetes, plugin/pkg/admission)."""


def refusal(message: str, otherwise: str) -> str:
    """Return the reason of what the API server refused with these words; `otherwise` for those of anybody else."""
    return next((reason for reason, words in _KINDS.items() if any(each in message for each in words)), otherwise)


def pods_refused(message: str) -> Obstacle:
    """Return the obstacle of a controller that cannot make its pods; each try has another name, which is left out."""
    said = _GENERATED.sub(r'pods "\1-*"', message)[:LONGEST_MESSAGE]
    if "error looking up service account" in said:  # it is made after the Job: see the endpoint where it is not
        return Obstacle("WaitingForServiceAccount", said, passing=True)
    return Obstacle(refusal(said, "FailedCreate"), said)


def refused(message: str) -> Obstacle:
    """Return the obstacle of a request that was refused."""
    return Obstacle(refusal(message, "Rejected"), message)


def foreign(kind: str, name: str, whose: str, *, leaving: bool) -> Obstacle:
    """Return the obstacle of an object that has the name of one that we need."""
    if leaving:
        return Obstacle("WaitingForDeletion", f"{kind} {name} of an earlier object is being deleted", passing=True)
    return Obstacle("NameTaken", f"{kind} {name} exists and is not {whose}: rename or delete one of them")
