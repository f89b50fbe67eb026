"""Values that are a text or something else, whose errors are those of what was sent: pydantic would name the first of a
union's types instead.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import Discriminator, Tag

T = TypeVar("T")

# Brackets keep the tags out of an error's path.
_TEXT, _OTHER = "[text]", "[other]"
of_text = Tag(_TEXT)
Text = Annotated[str, of_text]
Other = Annotated[T, Tag(_OTHER)]
by_shape = Discriminator(lambda value: _TEXT if isinstance(value, str) else _OTHER)
"""Of `Text | Other[X]`."""
