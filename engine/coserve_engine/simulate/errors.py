"""What a user of the simulator can get wrong."""

from coserve_engine.errors import EngineError


class SimulationError(EngineError):
    """A trace, a cost file or a flag that cannot be used; names it and the remedy."""
