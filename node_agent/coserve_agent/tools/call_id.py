"""The id by which a call and its result know each other."""

from __future__ import annotations

import secrets
import string

LETTERS = 9
"""Mistral's templates take no other number, and all take these."""
_ALPHABET = string.ascii_letters + string.digits


def call_id() -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(LETTERS))
