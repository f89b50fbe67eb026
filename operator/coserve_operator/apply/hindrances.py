"""The one path from an error of the API server to a condition: what a user must hear of, and what is tried again."""

from types import TracebackType

from coserve_operator.decide.observed import Obstacle
from coserve_operator.decide.obstacles import refused
from coserve_operator.kube import InvalidError, KubeError, NotFoundError

LISTEN_S = 5.0
"""How often is asked for what is told by events alone."""
LOOK_AGAIN_S = 30.0
"""After this time what stands in the way is tried again, since nothing may tell that it is gone."""


class ForeignObjectError(Exception):
    """An object of that name exists, and is not ours to change."""

    def __init__(self, obstacle: Obstacle) -> None:
        super().__init__(obstacle.message)
        self.obstacle = obstacle


class Hindrances:
    """Collects what goes wrong in the blocks that it is the context of, so that what follows is done all the same."""

    def __init__(self) -> None:
        self._obstacles: list[Obstacle] = []
        self._faults: list[KubeError] = []

    def __bool__(self) -> bool:
        return bool(self._obstacles or self._faults)

    @property
    def obstacle(self) -> Obstacle | None:
        """What a user must hear of; of several the first that does not pass by itself, with the messages of all."""
        if not self._obstacles:
            return None
        first = next((each for each in self._obstacles if not each.passing), self._obstacles[0])
        rest = [each.message for each in self._obstacles if each is not first]
        return Obstacle(first.reason, "; ".join([first.message, *rest]), first.passing)

    def check(self) -> None:
        """Raise the first error that is worth trying again at once."""
        if self._faults:
            raise self._faults[0]

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, ForeignObjectError):
            self._obstacles.append(error.obstacle)
        elif isinstance(error, (InvalidError, NotFoundError)):
            self._obstacles.append(refused(error.message))
        elif isinstance(error, KubeError):
            self._faults.append(error)
        else:
            return False
        return True
