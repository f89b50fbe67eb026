"""Kubernetes quantities, read exactly: 1.5Gi, 1e3, 500m, 2."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from coserve_api.errors import InvalidValueError

MAX_LENGTH = 32
_NUMBER = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE]([-+]?[0-9]{1,2})|([numkMGTPE]|[KMGTPE]i)?)")
_DECIMAL = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_BINARY = {"Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40, "Pi": 50, "Ei": 60}


def quantity(text: str) -> Fraction:
    """The value of a quantity that is not negative; InvalidValueError for anything else.

    k8s.io/apimachinery/pkg/api/resource: a number with one of the suffixes n to E or Ki to Ei, or an exponent of ten.
    """
    match = _NUMBER.fullmatch(text) if len(text) <= MAX_LENGTH else None
    if match is None:
        raise InvalidValueError(f"{text[:40]!r} must be a quantity such as 2, 500m, 1.5Gi or 1e3")
    exponent, suffix = match[2], match[3] or ""
    number = Fraction(match[1].removesuffix("."))
    if suffix in _BINARY:
        return number * (1 << _BINARY[suffix])
    return number * Fraction(f"1e{exponent or _DECIMAL[suffix]}")


def quantity_bytes(text: str) -> int:
    """A memory quantity such as "1.5Gi" in bytes, rounded up as Kubernetes does."""
    return math.ceil(quantity(text))


@dataclass(frozen=True, slots=True)
class Between:
    """Metadata of a quantity: its bounds, and what to write instead. A whole number needs no quotes; a number with a
    point does, since the API server takes it for a float.
    """

    least: str
    most: str
    remedy: str

    def check(self, value: object) -> str:
        if isinstance(value, float):
            raise InvalidValueError(f'{value} is no whole number: write it in quotes, "{value}"; it {self.remedy}')
        text = str(value) if type(value) is int else value
        if not isinstance(text, str):
            raise InvalidValueError(f"{value!r} {self.remedy}")
        try:
            inside = quantity(self.least) <= quantity(text) <= quantity(self.most)
        except InvalidValueError:
            inside = False
        if not inside:
            raise InvalidValueError(f"{text[:40]!r} {self.remedy}")
        return text

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        inside = f"quantity({{0}}).compareTo(quantity('{self.least}')) >= 0"
        inside += f" && quantity({{0}}).compareTo(quantity('{self.most}')) <= 0"
        text, number = inside.format("self"), inside.format("string(self)")
        return {
            "x-kubernetes-int-or-string": True,
            "maxLength": MAX_LENGTH,
            "x-kubernetes-validations": [
                {
                    "rule": f"type(self) == string ? isQuantity(self) && {text} : {number}",
                    "message": self.remedy,
                    "messageExpression": f"string(self) + ' {self.remedy}'",
                }
            ],
        }


Memory = Annotated[
    str, Between("1Mi", "64Ti", "must be a quantity of bytes from 1Mi to 64Ti, such as 256Mi, 1.5Gi or 40Gi")
]
ResourceQuantity = Annotated[
    str, Between("0", "1Ei", "must be a quantity from 0 to 1Ei, such as 2, 500m, 1.5Gi or 1e3")
]
