"""What is learned from a row: tokens, and which of them.

The context of an answer is exactly what the server would ask for it with, since one function makes both
(`Tokenizer.encode_chat`). Behind it stand the message's own parts and the end of its turn (turns.py), and these are
learned. Where the prompt of the next answer begins with a prompt and its answer, both are one sequence; else (templates
that write earlier turns differently later) each is a sequence of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from typing import Any

from coserve_agent.chat.end_tokens import EndOfTurn, end_of_turn
from coserve_agent.chat.format import USER, plain
from coserve_agent.chat.template import ChatTemplateError, Given, Message
from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.chat.turns import answer, thought_in
from coserve_agent.chat.variables import check_variables, try_variables
from coserve_agent.errors import AgentError


class RenderingError(AgentError):
    """What is wrong with a row, and the remedy."""


@dataclass(frozen=True)
class Conversation:
    """Messages as the chat template gets them. `learned` are the indices of the assistant's messages to learn; None:
    all.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()
    learned: frozenset[int] | None = None


@dataclass
class Rendered:
    """A sequence; `learned[i]` says whether `tokens[i]` is. `turn` counts the sequences of a row by their first answer,
    from 0.
    """

    turn: int
    tokens: list[int] = field(default_factory=list)
    learned: list[bool] = field(default_factory=list)

    def extend(self, tokens: Sequence[int], learned: bool) -> None:
        self.tokens += tokens
        self.learned += [learned] * len(tokens)


@dataclass(frozen=True)
class _Turn:
    """Prompt and answer, as text and as tokens; `joint` if these are the tokens of the whole text."""

    prompt: str
    prompt_tokens: list[int]
    answer: str
    answer_tokens: list[int]
    joint: bool


class Renderer:
    """Makes sequences with the model's tokenizer and chat template.

    Args:
        end_tokens: what ends an answer when served; the first is appended where nothing else ends one.
        variables: for the chat template, by name.
        today: the date for a template that asks for it.

    Raises:
        TemplateVariableError: the template reads no such variable, or cannot take its value.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        end_tokens: Sequence[int],
        variables: Mapping[str, Any] | None = None,
        today: date | None = None,
    ) -> None:
        check_variables(tokenizer, variables or {}, "templateVariables")
        try_variables(tokenizer, variables or {}, "templateVariables", [USER])
        self.tokenizer = tokenizer
        self.ends = tuple(end_tokens)
        self._variables = dict(variables or {})
        dated = tokenizer.template is not None and tokenizer.template.asks_for_the_date
        self._today = today if dated else None

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What whoever starts a job should know."""
        tokenizer, ends = self.tokenizer, self.ends
        if not ends:
            return ("the model's folder names no end token, so prompts and texts are taught without one",)
        end = self._end_of_turn
        if tokenizer.template is not None and end.token is None:
            name = tokenizer.pieces.bytes_of(ends[0]).decode(errors="replace")
            return (f"the chat template ends no turn with a special token: {name} is appended to each answer",)
        return ()

    @property
    def digest(self) -> str:
        """Of what the sequences depend on beside the tokenizer and its template."""
        content = [self._variables, self._today and self._today.isoformat(), self.ends]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    # ---- rows ----

    def chat(self, conversation: Conversation) -> list[Rendered]:
        """The sequences of a conversation.

        Raises:
            RenderingError: the template refuses it, or nothing of it can be learned.
        """
        messages, sequences = conversation.messages, list[Rendered]()
        asked = [n for n, one in enumerate(messages) if one["role"] == "assistant" and n > 0]
        wanted = [n for n in asked if conversation.learned is None or n in conversation.learned]
        if not wanted:
            raise RenderingError(_nothing_to_learn(conversation))
        before: _Turn | None = None
        for count, index in enumerate(wanted):
            try:
                turn = self._turn(conversation, index, before)
            except ChatTemplateError as error:
                remedy = "change the messages to what the model's chat template takes"
                where = f"messages[{index}]"
                raise RenderingError(f"{where}: {error}; {remedy}", f"{where}: {error.public}; {remedy}") from None
            last = sequences[-1] if sequences else Rendered(-1)
            if not sequences or turn.prompt_tokens[: len(last.tokens)] != last.tokens:
                last = Rendered(count)
                sequences.append(last)
            last.extend(turn.prompt_tokens[len(last.tokens) :], False)
            last.extend(turn.answer_tokens, True)
            before = turn
        return sequences

    def completion(self, prompt: str, completion: str) -> Rendered:
        """A prompt and what is learned behind it, which ends once."""
        tokens = self.tokenizer.encode(prompt)
        learned = self._ended(self.tokenizer.encode_behind(prompt, tokens, completion).tokens)
        return Rendered(0, tokens + learned, [False] * len(tokens) + [True] * len(learned))

    def text(self, text: str) -> Rendered:
        """A text of which everything is learned, and its end."""
        tokens = self._ended(self.tokenizer.encode(text))
        return Rendered(0, tokens, [True] * len(tokens))

    # ---- a turn ----

    def _turn(self, conversation: Conversation, index: int, before: _Turn | None) -> _Turn:
        messages, message = conversation.messages[:index], dict(conversation.messages[index])
        message.pop("name", None)  # no prompt asks for one, so it is no part of the answer
        given = Given(conversation.tools, self._variables, self._today)

        def render(messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
            return self.tokenizer.render(messages, given, add_generation_prompt=add_generation_prompt)

        prompt = render(messages, add_generation_prompt=True)
        if any(tool.get("function", tool)["name"] not in prompt for tool in conversation.tools):
            raise ChatTemplateError("the chat template does not write tools there")
        tokens = self._prompt_tokens(prompt, before)
        said, end = self._split_end(answer(render, messages, message, prompt, self._end_of_turn.tail), message)
        _check_written(message, said)
        behind = self.tokenizer.encode_behind(prompt, tokens, said + end)
        if end:
            return _Turn(prompt, tokens, said + end, *behind)
        if not self.ends:
            raise ChatTemplateError(
                "the chat template ends no turn with a special token and the model's folder names no eos_token, so no "
                "answer could be taught to end; set eos_token in tokenizer_config.json"
            )
        return _Turn(prompt, tokens, said, [*behind.tokens, self.ends[0]], joint=False)

    def _prompt_tokens(self, prompt: str, before: _Turn | None) -> list[int]:
        """As the server would make them; what is known of them from the turn before is not made again."""
        if before is not None and before.joint:
            known = before.prompt + before.answer
            if prompt.startswith(known):
                return self.tokenizer.extend(known, before.prompt_tokens + before.answer_tokens, prompt)
        return self.tokenizer.encode(prompt, add_special_tokens=False)

    def _split_end(self, said: str, message: Message) -> tuple[str, str]:
        """What was said, and the end of the turn up to its special token; "" where there is none, which a content that
        ends with some other token does not change.
        """
        end = self._end_of_turn
        if end.tail and said.endswith(end.tail):
            said = said.removesuffix(end.tail)
            return (said + end.tail.rstrip(), "") if end.token is None else (said, end.text)
        shown = said.rstrip()
        own = plain(message).rstrip()
        special = self.tokenizer.pieces.special.items()
        found = [one for token, one in special if token in self.ends or not own.endswith(one)]
        last = max(filter(shown.endswith, found), key=len, default="")
        return (shown.removesuffix(last), last) if last else (said, "")

    @cached_property
    def _end_of_turn(self) -> EndOfTurn:
        return end_of_turn(self.tokenizer, self.ends)

    # ---- ends ----

    def _ended(self, tokens: list[int]) -> list[int]:
        return tokens if tokens[-1:] and tokens[-1] in self.ends else [*tokens, *self.ends[:1]]


def _check_written(message: Message, said: str) -> None:
    """Refuse a part of the assistant's message that leaves no trace."""
    thought = str(message.get("reasoning_content") or "").strip()
    if thought and thought not in said:
        raise ChatTemplateError("the chat template does not write reasoning_content")
    if thought_in(plain(message)) not in said:
        raise ChatTemplateError("the chat template does not write the think block in content")
    calls = message.get("tool_calls") or ()
    if any(call["function"]["name"] not in said for call in calls):
        raise ChatTemplateError("the chat template does not write tool_calls")
    if calls and plain(message).rpartition("</think>")[2].strip() not in said:
        raise ChatTemplateError("the chat template does not write content beside tool_calls")
    if not said.strip():
        raise ChatTemplateError("the chat template writes nothing of this message, so its end alone would be learned")


def _nothing_to_learn(conversation: Conversation) -> str:
    roles = [one["role"] for one in conversation.messages]
    if roles.count("assistant") == 0:
        return "messages has no assistant message, so there is nothing to learn; add one"
    if roles[0] == "assistant" and roles.count("assistant") == 1:
        return "only messages[0] is the assistant's, and nobody asks for it; begin with a system or user message"
    return "messages has no assistant message that is to be learned; give one a weight of 1"
