"""The agent's error tree: what stops the process, what fails a job, what refuses a request."""

from coserve_api.job_status import FailedReason


class AgentError(Exception):
    """Base of everything the agent raises on purpose.

    Args:
        public: the message without any content of a user's data, for status, events and logs; None: it has none.
    """

    def __init__(self, message: str = "", public: str | None = None) -> None:
        super().__init__(message)
        self.public = message if public is None else public


class StartError(AgentError):
    """The process cannot start; the message names the setting or file, its value and the remedy."""


class EngineGoneError(AgentError):
    """The engine process ended; nothing can be generated or trained any more."""


class JobFailedError(AgentError):
    """A job cannot go on; `reason` is what its condition will say."""

    def __init__(self, reason: FailedReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class FencedError(AgentError):
    """A higher epoch, or another agent, has the job: this run of it must write nothing more."""


class DatasetError(AgentError):
    """The dataset cannot be used; `line` counts from 1 where one line is at fault."""

    def __init__(self, reason: FailedReason, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.line = line
