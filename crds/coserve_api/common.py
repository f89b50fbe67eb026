"""The scalar types of the custom resources: each carries its pattern, its bound and the message a user gets, for Python
and for the CRD alike.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.alias_generators import to_camel
from pydantic_core import CoreSchema, core_schema

from coserve_api.errors import InvalidValueError

GROUP = "coserve.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
LONGEST_SHOWN = 512
"""Characters of a text that a message repeats."""


def cel_string(text: str) -> str:
    """`text` as a literal of CEL."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


@dataclass(frozen=True, slots=True)
class Text:
    """Metadata of an annotated string: a whole-string pattern, a bound, what to write instead, and further CEL rules.

    The pattern becomes a CEL rule, since a structural `pattern` answers with the expression instead of the remedy.
    `range_rule` is CEL that sees a `self` which matched; `in_range` is the same in Python.
    """

    pattern: str
    max_length: int
    remedy: str
    range_rule: str = ""
    in_range: Any = None
    min_length: int = 0

    def check(self, value: str) -> str:
        if len(value) > self.max_length or not re.fullmatch(self.pattern, value):
            raise InvalidValueError(f"{value[:80]!r} {self.remedy}")
        if self.in_range is not None and not self.in_range(value):
            raise InvalidValueError(f"{value[:80]!r} {self.remedy}")
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        rule = f"self.matches({cel_string('^(' + self.pattern + ')$')})"
        if self.range_rule:
            rule += f" && {self.range_rule}"
        bounds: dict[str, Any] = {"minLength": self.min_length} if self.min_length else {}
        return {
            "type": "string",
            "maxLength": self.max_length,
            **bounds,
            "x-kubernetes-validations": [{"rule": rule, "message": self.remedy, **self._shown()}],
        }

    def _shown(self) -> dict[str, str]:
        """The message with the value, which the API server would show as "string"; long texts stay out of it."""
        quoted = '"\'" + self + "\' " + '
        return {"messageExpression": quoted + cel_string(self.remedy)} if self.max_length <= LONGEST_SHOWN else {}


# ---- durations ----

_DURATION_PATTERN = "([0-9]{1,4}h)?([0-9]{1,5}m)?([0-9]{1,6}s)?([0-9]{1,9}ms)?"
_DURATION = re.compile(_DURATION_PATTERN)
_UNITS_MS = (3_600_000, 60_000, 1_000, 1)


def duration_ms(text: str) -> int:
    """A duration such as "200ms", "1s" or "1m30s" in milliseconds; InvalidValueError for anything else."""
    match = _DURATION.fullmatch(text)
    if not text or match is None:
        raise InvalidValueError(f"{text[:40]!r} must be a duration such as 200ms, 1s or 1m30s")
    return sum(int(part.rstrip("hms")) * unit for part, unit in zip(match.groups(), _UNITS_MS, strict=True) if part)


def format_duration(ms: int) -> str:
    """The shortest duration string of `ms` milliseconds; "0s" for none."""
    parts = []
    for unit_ms, unit in zip(_UNITS_MS, ("h", "m", "s", "ms"), strict=True):
        count, ms = divmod(ms, unit_ms)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts) or "0s"


def _latency_in_range(text: str) -> bool:
    return bool(text) and 1 <= duration_ms(text) <= 3_600_000


def _window_in_range(text: str) -> bool:
    return bool(text) and duration_ms(text) <= 3_600_000


Duration = Annotated[
    str,
    Text(
        _DURATION_PATTERN,
        32,
        "must be a duration from 1ms to 1h, such as 200ms, 1s or 1m30s",
        "size(self) > 0 && duration(self) >= duration('1ms') && duration(self) <= duration('1h')",
        _latency_in_range,
    ),
]
Window = Annotated[
    str,
    Text(
        _DURATION_PATTERN,
        32,
        "must be a duration from 0s to 1h, such as 30s or 5m",
        "size(self) > 0 && duration(self) <= duration('1h')",
        _window_in_range,
    ),
]
Elapsed = Annotated[str, Field(max_length=32, pattern="^" + _DURATION_PATTERN + "$")]

# ---- numbers: no floats in a custom resource ----

_DECIMAL = r"[0-9]{1,6}(\.[0-9]{1,12})?([eE][-+]?[0-9]{1,2})?"

PositiveDecimal = Annotated[
    str,
    Text(
        _DECIMAL,
        24,
        'must be a decimal string above 0 and at most 1, such as "2e-4"',
        "double(self) > 0.0 && double(self) <= 1.0",
        lambda text: 0.0 < float(text) <= 1.0,
    ),
]
EpsilonDecimal = Annotated[
    str,
    Text(
        _DECIMAL,
        24,
        'must be a decimal string from 1e-12 to 1, such as "1e-8"',
        "double(self) >= 1e-12 && double(self) <= 1.0",
        lambda text: 1e-12 <= float(text) <= 1.0,
    ),
]
UnitDecimal = Annotated[
    str,
    Text(
        _DECIMAL,
        24,
        'must be a decimal string from 0 to 1, such as "0.01"',
        "double(self) <= 1.0",
        lambda text: float(text) <= 1.0,
    ),
]
DropoutDecimal = Annotated[
    str,
    Text(
        _DECIMAL,
        24,
        'must be a decimal string from 0 to 0.9, such as "0.05"',
        "double(self) <= 0.9",
        lambda text: float(text) <= 0.9,
    ),
]
BetaDecimal = Annotated[
    str,
    Text(
        _DECIMAL,
        24,
        'must be a decimal string from 0 to below 1, such as "0.999"',
        "double(self) < 1.0",
        lambda text: float(text) < 1.0,
    ),
]
NonNegativeDecimal = Annotated[
    str,
    Text(
        _DECIMAL,
        24,
        'must be a decimal string from 0 to 1000000, such as "1.0"',
        "double(self) <= 1000000.0",
        lambda text: float(text) <= 1e6,
    ),
]
Measured = Annotated[str, Field(max_length=24, pattern=r"^-?[0-9]{1,12}(\.[0-9]{1,12})?([eE][-+]?[0-9]{1,3})?$")]


def format_decimal(value: float) -> str:
    """A measured number as status shows it: six significant digits, `Measured`'s pattern. The value must be finite."""
    return f"{value:.6g}"


# ---- names ----

LABEL_PATTERN = "[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
Label = Annotated[
    str,
    Text(
        LABEL_PATTERN,
        63,
        "must be a DNS-1123 label: at most 63 of a-z, 0-9 and -, beginning and ending with a letter or digit",
    ),
]
Subdomain = Annotated[
    str,
    Text(
        "[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?",
        253,
        "must be a Kubernetes name: at most 253 of a-z, 0-9, - and ., beginning and ending with a letter or digit",
    ),
]
ModelName = Annotated[
    str,
    Text(
        "[A-Za-z0-9]([A-Za-z0-9._/-]{0,126}[A-Za-z0-9])?",
        128,
        "must be a model name such as tiny or org/model-8b: at most 128 of letters, digits, ., _, / and -",
    ),
]


def _is_day(value: str) -> bool:
    try:
        return date.fromisoformat(value).year > _FIRST_YEAR
    except ValueError:
        return False


_FIRST_YEAR = 1900
Day = Annotated[
    str,
    Text(
        "[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])",
        10,
        "must be a day of the calendar such as 2026-07-26",
        range_rule=f"timestamp(self + 'T00:00:00Z').getFullYear() > {_FIRST_YEAR}",
        in_range=_is_day,
    ),
]
MAX_VARIABLES = 32
MAX_VARIABLES_BYTES = 16 << 10
MAX_VARIABLES_DEPTH = 32


def variables_fault(variables: Mapping[str, Any]) -> str:
    """What is said of variables of a chat template that are too many, too large or nested too deeply, beginning with
    the verb; "" where they are not. No rule of the API server can see into them, so whoever uses them asks here.
    """
    if len(variables) > MAX_VARIABLES:
        return f"has {len(variables)} variables, and {MAX_VARIABLES} are allowed; take some out"
    depth, level = 1, [_items(variables)]
    while level := [_items(value) for values in level for value in values if isinstance(value, list | dict)]:
        depth += 1
        if depth > MAX_VARIABLES_DEPTH:
            return f"is nested more than {MAX_VARIABLES_DEPTH} deep; make it flatter"
    size = len(json.dumps(variables, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    if size > MAX_VARIABLES_BYTES:
        return f"takes {size} bytes of JSON, and {MAX_VARIABLES_BYTES} are allowed; make it smaller"
    return ""


def _items(value: list[Any] | Mapping[str, Any]) -> Collection[Any]:
    return value if isinstance(value, list) else value.values()


TemplateVariables = Annotated[
    dict[str, Any],
    Field(
        max_length=MAX_VARIABLES,
        json_schema_extra={
            "type": "object",
            "maxProperties": MAX_VARIABLES,
            "x-kubernetes-preserve-unknown-fields": True,
        },
    ),
]
Origin = Annotated[
    str,
    Text(
        r"\*|[a-z][a-z0-9+.-]{0,31}://([a-z0-9]([a-z0-9._-]*[a-z0-9])?|\[[0-9a-f:]+\])(:[1-9][0-9]{0,4})?",
        300,
        "must be an origin as browsers send it, such as https://chat.example.com or http://localhost:3000 (lower case, "
        "no path), or * for all",
    ),
]
Uid = Annotated[
    str, Text("[A-Za-z0-9-]{1,64}", 64, "must be 1 to 64 letters, digits or -, as Kubernetes' UIDs are", min_length=1)
]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", max_length=64)]
Timestamp = Annotated[str, Field(max_length=32, json_schema_extra={"format": "date-time"})]


def timestamp(moment: datetime) -> str:
    """`moment` (with a time zone) as Kubernetes writes times: UTC, whole seconds."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# ---- counts: what custom resources, messages and the agents' settings have in common ----

ModelLength = Annotated[int, Field(ge=16, le=1_048_576)]
SequenceLength = Annotated[int, Field(ge=8, le=1_048_576)]
Rank = Annotated[int, Field(ge=1, le=256)]
ConcurrentJobs = Annotated[int, Field(ge=1, le=16)]
Percentile = Annotated[int, Field(ge=50, le=100)]
SlowdownPercent = Annotated[int, Field(ge=0, le=100_000)]
BatchTokens = Annotated[int, Field(ge=128, le=65_536)]
Requests = Annotated[int, Field(ge=1, le=4096)]
Threads = Annotated[int, Field(ge=1, le=256)]
EvalPercent = Annotated[int, Field(ge=0, le=50)]
Epochs = Annotated[int, Field(ge=1, le=10_000)]
Steps = Annotated[int, Field(ge=1, le=10_000_000)]
BatchSize = Annotated[int, Field(ge=1, le=1024)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]

# ---- bases ----


class SpecModel(BaseModel):
    """A part of a spec: camelCase outside, snake_case inside. Unknown fields are ignored: the API server has refused
    what its CRD does not know, and after a roll-back the older program must read what was made for the newer one.
    """

    model_config = ConfigDict(
        extra="ignore", frozen=True, alias_generator=to_camel, populate_by_name=True, use_attribute_docstrings=True
    )


class StatusModel(BaseModel):
    """A part of a status. Unknown fields are kept: after a roll-back the older operator must read what the newer one
    wrote, and write it back.
    """

    model_config = ConfigDict(
        extra="allow", frozen=True, alias_generator=to_camel, populate_by_name=True, use_attribute_docstrings=True
    )

    @property
    def unknown(self) -> dict[str, Any]:
        """Fields that this version does not know, as they came."""
        return dict(self.model_extra or {})

    def to_dict(self) -> dict[str, Any]:
        """As the API server takes it; what is not known (None) is left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class ObjectMeta(BaseModel):
    """What is read of an object's metadata."""

    model_config = ConfigDict(extra="ignore", frozen=True, alias_generator=to_camel, populate_by_name=True)

    name: str
    namespace: str = "default"
    uid: str = ""
    generation: int = 0
    resource_version: str = ""
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)
