"""What an endpoint's status says of its adapters: whether agents have them, and what spec.adapters holds back."""

from collections.abc import Iterable, Mapping, Sequence

from coserve_api.adapters import AdapterState
from coserve_api.endpoint import InferenceEndpoint
from coserve_contract.messages import AdapterFailure, AdapterRecord, Heartbeat
from coserve_operator.decide.published import Versions, greatest_rank

SHOWN = 5
"""Names in a message."""


def count(record: AdapterRecord, agents: Iterable[Heartbeat]) -> int:
    """Return how many of the agents have this version loaded."""
    return sum(beat.adapters.get(record.name) == record.number for beat in agents)


def failure(name: str, number: int, beat: Heartbeat) -> AdapterFailure | None:
    """Return what the agent says of a version that it could not load."""
    return next((each for each in beat.failed_adapters if (each.name, each.number) == (name, number)), None)


def told(
    endpoint: InferenceEndpoint, known: Versions, serving: Mapping[str, AdapterRecord], agents: Sequence[Heartbeat]
) -> tuple[bool | None, str, str]:
    """Return status, reason and message of the condition AdaptersReady, of `agents` that are ready."""
    unknown = _unknown_pins(endpoint, known)
    if unknown:
        return False, "VersionNotFound", unknown
    if not known:
        return True, "NoAdapters", "none is published"
    held = _held_back(endpoint, known, serving)
    if not agents:
        return None, "NoAgents", _sentence("no agent is ready", held)
    failed = _failed(serving, agents)
    if failed:
        return False, "LoadFailed", _sentence(failed, held)
    missing = [name for name, record in serving.items() if count(record, agents) < len(agents)]
    if missing:
        return False, "Loading", _sentence(f"agents load {_names(missing)}", held)
    rank, most = greatest_rank(known), endpoint.spec.finetuning.max_rank
    if rank > most:
        wide = [name for name, versions in known.items() if any(each.rank > most for each in versions)]
        message = f"{_names(wide)} was published with a rank up to {rank}, and spec.finetuning.maxRank is {most}"
        return True, "RankAboveMaxRank", _sentence(f"{message}: agents keep room for {rank}", held)
    return True, "AllLoaded", _sentence(f"each ready agent has all {len(serving)} served adapters", held)


def _unknown_pins(endpoint: InferenceEndpoint, known: Versions) -> str:
    for each in endpoint.spec.adapters:
        there = [record.number for record in known.get(each.name, ())]
        if each.state is AdapterState.PRESENT and each.version is not None and each.version not in there:
            have = f"known are {', '.join(map(str, there[:8]))}" if there else "none of that name is published"
            return (
                f"spec.adapters pins {each.name} to version {each.version}, and {have}: name one of these, or take the "
                "entry out; until then what was served stays"
            )
    return ""


def _held_back(endpoint: InferenceEndpoint, known: Versions, serving: Mapping[str, AdapterRecord]) -> str:
    """Return which published versions spec.adapters keeps from being served."""
    hidden = [name for name in known if name not in serving]
    older = [
        f"{name} stays at version {record.number}, {known[name][0].number} is published"
        for name, record in sorted(serving.items())
        if record.number != known[name][0].number
    ]
    parts = [f"spec.adapters hides {_names(hidden)}"] if hidden else []
    return "; ".join([*parts, *older[:SHOWN], *([f"and {len(older) - SHOWN} more"] if len(older) > SHOWN else [])])


def _failed(serving: Mapping[str, AdapterRecord], agents: Sequence[Heartbeat]) -> str:
    """Return which versions agents could not load, and why one of them could not."""
    found: dict[str, list[AdapterFailure]] = {}
    for beat in agents:
        for each in beat.failed_adapters:
            record = serving.get(each.name)
            if record is not None and record.number == each.number and beat.adapters.get(each.name) != each.number:
                found.setdefault(each.name, []).append(each)
    if not found:
        return ""
    name, (first, *more) = min(found.items())
    others = f"; so do {_names(sorted(found)[1:])}" if len(found) > 1 else ""
    return (
        f"{name} version {first.number} does not load on {1 + len(more)} of {len(agents)} ready agents: {first.reason}"
        f"{others}; it is tried again, and all else is served"
    )


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(sorted(names)[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"


def _sentence(first: str, then: str) -> str:
    return f"{first}; {then}" if then else first
