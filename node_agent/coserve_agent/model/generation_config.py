"""What a model's own generation_config.json says: its end tokens, and how to sample where a request does not say.

As vLLM does: only values that stand in the file count, not those that transformers would fill in, and `do_sample` is
no parameter of a request. Bounds are those of the HTTP API, which takes the same types.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError

from coserve_agent.errors import StartError

FILE = "generation_config.json"

Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
TopP = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
"""0 keeps the likeliest token alone."""
TopK = Annotated[StrictInt, Field(ge=-1, lt=1 << 31)]
"""0 and -1 keep all."""
MinP = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
RepetitionPenalty = Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)]


@dataclass(frozen=True)
class SamplingDefaults:
    """What holds for a request that leaves a value out. `max_tokens` None: as many as the context has room for."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None

    def __str__(self) -> str:
        values = [(one.name, getattr(self, one.name)) for one in fields(self)]
        shown = [f"{name} {value}" for name, value in values if value != getattr(SamplingDefaults, name)]
        return ", ".join(shown) or "neutral"


class _Values(BaseModel):
    """The file's fields of that kind; null is a field that is not there."""

    model_config = ConfigDict(extra="ignore", strict=True)

    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    repetition_penalty: RepetitionPenalty | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None


def sampling_defaults(folder: Path) -> SamplingDefaults:
    """The defaults of the model in `folder`; neutral ones where it names none.

    Raises:
        StartError: a value is wrong; names file, field, value and remedy.
    """
    try:
        values = _Values.model_validate(_whole_numbers(_read(folder))).model_dump(exclude_none=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field, message = first["loc"][0], first["msg"]
        raise StartError(
            f"{folder / FILE}: {field} is {first['input']!r}: {message[:1].lower()}{message[1:]}; correct the file, or "
            "set the endpoint's engine.generationConfig (COSERVE_GENERATION_CONFIG) to Neutral to sample without it"
        ) from None
    if "max_new_tokens" in values:
        values["max_tokens"] = values.pop("max_new_tokens")
    return SamplingDefaults(**values)


def end_tokens(folder: Path) -> tuple[int, ...]:
    """End tokens that the file names; chat models often have more than config.json says."""
    return token_ids(folder / FILE, _read(folder).get("eos_token_id"))


def token_ids(path: Path, eos: object) -> tuple[int, ...]:
    """The `eos_token_id` of the file `path`: one id, a list of them, or null.

    Raises:
        StartError: it is something else.
    """
    values = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if any(isinstance(value, bool) or not isinstance(value, int) or value < 0 for value in values):
        raise StartError(f"{path}: eos_token_id is {eos!r}; it must be a token id, a list of them, or null")
    return tuple(values)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / FILE
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StartError(f"{path}: not readable as JSON ({error}); copy the model folder again") from None
    if not isinstance(content, dict):
        raise StartError(f"{path}: is a JSON {type(content).__name__}, not an object; copy the model folder again")
    return content


def _whole_numbers(fields: dict[str, Any]) -> dict[str, Any]:
    """20.0 is 20: JSON has one kind of number."""
    return {
        name: int(value) if isinstance(value, float) and value.is_integer() else value for name, value in fields.items()
    }
