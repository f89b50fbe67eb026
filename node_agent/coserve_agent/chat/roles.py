"""Which roles a chat template writes, and of which it writes the message's name. Most templates skip a role that they
do not know, and the message is gone without a word; so each role is tried once, with words that are looked for in what
the template writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

from coserve_agent.chat.format import USER, Render
from coserve_agent.chat.template import ChatTemplateError, Message

_WORD, _NAME = "quokka", "numbat"
_ROLES_KEPT = 64
"""Roles whose answer is remembered: their names are the client's, so there is a bound."""
_MOST_ROLES = 16
"""In one conversation: to try a role costs about as much as to render a short one, some times over."""


class Roles:
    """The roles of one template.

    Args:
        render: a conversation as text, without what asks for an answer.
    """

    def __init__(self, render: Render) -> None:
        self._render = render
        self._written = lru_cache(_ROLES_KEPT)(self._try)
        self._named = lru_cache(_ROLES_KEPT)(self._try_name)

    def as_written(self, messages: Sequence[Message]) -> list[Message]:
        """`messages`, with developer as system where the template writes no developer (as OpenAI's models take one for
        the other).

        Raises:
            ChatTemplateError: a message whose role leaves no trace in what the template writes, or very many roles. A
                role that the template itself refuses is left to it: its reason is the better one.
        """
        different = len({str(message["role"]) for message in messages})
        if different > _MOST_ROLES:
            raise ChatTemplateError(f"the messages have {different} different roles; at most {_MOST_ROLES} are allowed")
        known: list[Message] = []
        for n, message in enumerate(messages):
            given = role = str(message["role"])
            if given == "developer" and not self._written(given, n == 0):
                role = "system"
            if self._written(role, n == 0) is False:
                rest = (
                    f", which this model's chat template does not write{' there' if n else ''}: it would be lost; use "
                    "another role, or put its text into another message"
                )
                public = f"message {n} has a role{rest}"
                raise ChatTemplateError(f"message {n} has role {given[:40]!r}{rest}", public)
            known.append(message if role == given else {**message, "role": role})
        return known

    def writes_name(self, role: str) -> bool:
        """Whether the template writes the name of a message of `role`, wherever it may stand."""
        return self._named(role)

    def _try(self, role: str, first: bool) -> bool | None:
        """Whether the template writes a message of `role`, as the first one or a later; None where it refuses all."""
        refused = True
        for text in self._texts({"role": role, "content": _WORD}, first):
            if _WORD in text:
                return True
            refused = False
        return None if refused else False

    def _try_name(self, role: str) -> bool:
        known = "system" if role == "developer" and not self._written(role, True) else role
        said = {"role": known, "content": _WORD, "name": _NAME}
        return any(_NAME in text for first in (True, False) for text in self._texts(said, first))

    def _texts(self, said: Message, first: bool) -> Iterator[str]:
        """What the template writes of the conversations that it does not refuse."""
        for conversation in _places(said, first):
            try:
                yield self._render(conversation).lower()
            except ChatTemplateError:
                continue


def _places(said: Message, first: bool) -> Iterator[list[Message]]:
    """Conversations in which a template may expect the message `said`, the likely ones first."""
    user = USER
    system, assistant = ({**USER, "role": one} for one in ("system", "assistant"))
    if first:
        yield from ([said, user], [said], [said, assistant], [said, user, assistant])
        return
    yield from ([user, said], [user, assistant, said], [user, said, user], [user, said, assistant, user])
    yield from ([system, said], [system, user, said], [system, user, said, user], [system, user, assistant, said])
    # The result of a call, with the fields that templates ask of it; Mistral's want ids of nine characters.
    name, id = "wombat", "abcdefghi"
    call = {"id": id, "type": "function", "function": {"name": name, "arguments": {}}}
    calls: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
    result: Message = {"name": name, **said, "tool_call_id": id}
    yield from ([user, calls, result], [user, calls, result, assistant], [system, user, calls, result])
