"""A row as tokens, and which of them are learned."""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coserve_agent.errors import AgentError
from coserve_agent.tokenizer import ChatTemplateError, Tokenizer


@dataclass(frozen=True)
class Conversation:
    """Messages as `ChatMessage.plain` gives them. `learned` are the indices of those of the assistant's that are; None:
    all of them.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    learned: frozenset[int] | None = None


@dataclass(frozen=True)
class Rendered:
    """A sequence to learn from; `turn` tells those of one row apart, and the first is 0."""

    turn: int
    tokens: list[int]
    learned: list[bool]


class RenderingError(AgentError):
    """What is wrong with the row, and the remedy."""


class Renderer:
    """Renders rows with a model's tokenizer and chat template."""

    def __init__(
        self, tokenizer: Tokenizer, variables: Mapping[str, Any] | None = None, date: datetime.date | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.notes: tuple[str, ...] = ()
        self.digest = hashlib.sha256(json.dumps([variables or {}, str(date)], sort_keys=True).encode()).hexdigest()

    def chat(self, conversation: Conversation) -> list[Rendered]:
        try:
            rendered = self.tokenizer.render_training(conversation.messages, conversation.tools)
        except ChatTemplateError as error:
            raise RenderingError(
                f"messages: {error}; change the messages to what the model's chat template takes"
            ) from None
        learned = list(rendered.supervised)
        if conversation.learned is not None:
            turns = [n for n, message in enumerate(conversation.messages) if message["role"] == "assistant"]
            place = 0
            for n, (flag, run) in enumerate(itertools.groupby(learned)):
                length = len(list(run))
                if flag and turns[n // 2] not in conversation.learned:
                    learned[place : place + length] = [False] * length
                place += length
        return [Rendered(0, rendered.tokens, learned)]

    def completion(self, prompt: str, completion: str) -> Rendered:
        before = self.tokenizer.encode(prompt)
        answer = self.tokenizer.encode(completion, add_special_tokens=False) + self._end()
        return Rendered(0, before + answer, [False] * len(before) + [True] * len(answer))

    def text(self, text: str) -> Rendered:
        tokens = self.tokenizer.encode(text)
        tokens += [] if tokens[-1:] == self._end() else self._end()
        return Rendered(0, tokens, [True] * len(tokens))

    def _end(self) -> list[int]:
        return [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
