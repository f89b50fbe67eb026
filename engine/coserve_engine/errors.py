"""The engine's error tree: each names the thing at fault, its value and the remedy."""


class EngineError(Exception):
    """Base of everything the engine raises on purpose."""


class EngineConfigError(EngineError):
    """A setting that an engine cannot run with."""


class ModelFolderError(EngineError):
    """A model folder that is missing, broken or not supported."""


class AdapterFolderError(EngineError):
    """An adapter folder that is not a LoRA adapter for this model."""


class CheckpointError(EngineError):
    """A checkpoint folder that is missing, corrupt or of another run."""


class OtherArithmeticError(CheckpointError):
    """A checkpoint of a run that computed otherwise: with another dtype, or other sizes of tiles."""


class RequestError(EngineError):
    """A request that cannot run; `code` is part of the engine's interface, `field` the parameter at fault, if any."""

    def __init__(self, code: str, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.field = field


class JobError(EngineError):
    """A finetuning command that cannot be obeyed; `code` is part of the engine's interface."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class OutOfPagesError(EngineError):
    """The page pool cannot cover a reservation now; `lacking` pages more would do."""

    def __init__(self, message: str, lacking: int) -> None:
        super().__init__(message)
        self.lacking = lacking
