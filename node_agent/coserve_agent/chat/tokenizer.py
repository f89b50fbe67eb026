"""Text to tokens and back, from the model's own folder: local files only, never code from it, and without torch.

`PreTrainedTokenizerFast` reads tokenizer.json as it is. (`AutoTokenizer` would import torch, which the feeder must
not need.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from coserve_agent.chat.call_format import CallFormat, call_format
from coserve_agent.chat.continued import check_continued, cut_behind
from coserve_agent.chat.format import USER, roles_in_one_part, roles_in_parts, shaped
from coserve_agent.chat.roles import Roles
from coserve_agent.chat.template import NOTHING, REASONING_FIELDS, ChatTemplate, ChatTemplateError, Given, Message
from coserve_agent.chat.turns import opened
from coserve_agent.errors import StartError
from coserve_agent.text.cuts import Cuts
from coserve_agent.text.pieces import Pieces
from coserve_agent.text.unicode import lone_surrogate


class Placed(NamedTuple):
    """Tokens of a text, and the character at which each begins; those that stand for no character where they are."""

    tokens: list[int]
    starts: list[int]


class Behind(NamedTuple):
    """Tokens of a text behind others; `joint` if both together are the tokens of the whole text."""

    tokens: list[int]
    joint: bool


class Tokenizer:
    """The model's tokenizer and chat template.

    Raises:
        StartError: a file of the folder is missing or broken.
    """

    def __init__(self, folder: Path) -> None:
        inner = _load(folder)
        self._backend = inner.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        source = _chat_template(inner)
        self.template = None if source is None else ChatTemplate(source, inner.special_tokens_map)
        self.size = max((*self._backend.get_vocab(with_added_tokens=True).values(), -1)) + 1
        self.eos_token_id: int | None = inner.eos_token_id
        self.pieces = Pieces(self._backend)
        self._cuts = Cuts(self._backend, source or "")
        self._begin = self._ids_around("a")
        content = f"{self._backend.to_str()}\0{source or ''}"
        self.digest = hashlib.sha256(content.encode()).hexdigest()
        self._in_parts: frozenset[str] = frozenset()
        self._in_one_part: frozenset[str] = frozenset()
        self._calls: CallFormat | None = None
        if self.template is not None:
            plain = partial(self.template.render, add_generation_prompt=False)
            self._in_parts = roles_in_parts(plain)
            self._in_one_part = roles_in_one_part(plain, self._in_parts)
            self._calls = call_format(plain, self._in_parts)
            self._roles = Roles(lambda messages: _whole(plain(self._shaped(messages))))

    @cached_property
    def written_fields(self) -> frozenset[str]:
        """What the chat template writes beside roles and contents, of all that we could give it."""
        template, found = self.template, set[str]()
        if template is None:
            return frozenset()
        if template.reads("tools"):
            found.add("tools")
        if any(map(template.reads_field, REASONING_FIELDS)) or _opens_thought(template):
            found.add("reasoning_content")
        if self._calls is not None:
            found.add("tool_calls")
        return frozenset(found)

    def loses_name(self, message: Message) -> bool:
        """Whether the message has a name that the chat template does not write: a request's is left out then, as in
        vLLM, since many clients send one with each message.
        """
        named = message.get("name") is not None
        return named and self.template is not None and not self._roles.writes_name(str(message["role"]))

    @property
    def template_variables(self) -> frozenset[str]:
        """The names that may be set for the chat template."""
        return frozenset() if self.template is None else self.template.variables

    # ---- text to tokens ----

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Tokens of plain text, behind what the tokenizer begins a text with (often one token), which stands there
        once, whoever wrote it. What it would end a text with is left out: the text goes on.
        """
        # A batch of one, because only encode_batch lets other threads run meanwhile.
        ids: list[int] = self._backend.encode_batch([text], add_special_tokens=False)[0].ids
        begin = self._begin if add_special_tokens else []
        return list(ids) if ids[: len(begin)] == begin else begin + ids

    def encode_placed(self, text: str) -> Placed:
        """The same, and where in the text each token begins."""
        encoding = self._backend.encode_batch([text], add_special_tokens=False)[0]
        starts, end = [], 0
        for first, last in encoding.offsets:
            # Some tokenizers leave spaces out of what they say a token covers; the tokens of one character share it.
            starts.append(min(first, end))
            end = max(end, last)
        added = [] if encoding.ids[: len(self._begin)] == self._begin else self._begin
        return Placed([*added, *encoding.ids], [*[0] * len(added), *starts])

    def encode_behind(self, before: str, tokens: Sequence[int], text: str) -> Behind:
        """`text` as it goes on behind `tokens`, which are those of `before`: the joint tokens where they begin with
        `tokens`, else its own, without the space that some tokenizers put before a text.
        """
        joint = self.extend(before, tokens, before + text)
        if joint[: len(tokens)] == list(tokens):
            return Behind(joint[len(tokens) :], joint=True)
        return Behind(list(self._inside.encode(text, add_special_tokens=False).ids), joint=False)

    def extend(self, known: str, tokens: Sequence[int], text: str) -> list[int]:
        """Tokens of `text`, which begins with `known`, whose are `tokens`. Takes as long as what is new."""
        at = self._cuts.last(known)
        if at is not None:
            tail: list[int] = self._backend.encode(known[at:], add_special_tokens=False).ids
            kept = len(tokens) - len(tail)
            if list(tokens[kept:]) == tail:
                return [*tokens[:kept], *self._backend.encode(text[at:], add_special_tokens=False).ids]
        return self.encode(text, add_special_tokens=list(tokens[: len(self._begin)]) == self._begin)

    @cached_property
    def _inside(self) -> Backend:
        """The tokenizer without the space that it puts before a text."""
        plan = json.loads(self._backend.to_str())
        plan["normalizer"] = _without_prefix(plan.get("normalizer"))
        plan["pre_tokenizer"] = _without_prefix(plan.get("pre_tokenizer"))
        return Backend.from_str(json.dumps(plan))

    def _ids_around(self, text: str) -> list[int]:
        """What the tokenizer puts before a text."""
        plain = self._backend.encode(text, add_special_tokens=False).ids
        whole = self._backend.encode(text).ids
        for n in range(len(whole) - len(plain) + 1):
            if whole[n : n + len(plain)] == plain:
                return list(whole[:n])
        return []

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._backend.decode(list(tokens), skip_special_tokens=skip_special_tokens)

    # ---- chats ----

    def encode_chat(
        self, messages: Sequence[Message], given: Given = NOTHING, *, asks: bool = True, continues: bool = False
    ) -> list[int]:
        """Tokens of a conversation up to where the assistant begins to answer; where nothing `asks` for that, up to its
        end, and where it `continues` its last message, up to the end of that. A message's content is a string or a
        list of text parts, whichever the template takes.

        Raises:
            ChatTemplateError: there is no template, it refuses the messages, or the last cannot be continued.
        """
        if continues:
            check_continued(messages[-1])
        text = self.render(messages, given, add_generation_prompt=asks and not continues)
        text = cut_behind(text, *self._shaped(messages[-1:])) if continues else text
        return self.encode(text, add_special_tokens=False)

    def render(self, messages: Sequence[Message], given: Given = NOTHING, *, add_generation_prompt: bool) -> str:
        """The conversation as the template writes it.

        Raises:
            ChatTemplateError: there is no template, or it refuses the messages.
        """
        if self.template is None:
            raise ChatTemplateError("the model's folder has no chat template; use /v1/completions or the text format")
        shown = self._shaped(self._roles.as_written(messages))
        return _whole(self.template.render(shown, given, add_generation_prompt=add_generation_prompt))

    def _shaped(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        shown = [shaped(message, self._in_parts, self._in_one_part) for message in messages]
        return shown if self._calls is None else [self._calls.shaped(message) for message in shown]


def _opens_thought(template: ChatTemplate) -> bool:
    """Whether an answer begins inside a think block, as DeepSeek-R1's does: its template writes none."""
    try:
        return opened(template.render([USER], add_generation_prompt=True)) is not None
    except ChatTemplateError:
        return False


def _whole(text: str) -> str:
    if lone_surrogate(text) is not None:
        raise ChatTemplateError("the chat template writes half of a surrogate pair, which is no character")
    return text


def _without_prefix(step: Any) -> Any:
    """A step of a tokenizer's plan without the space that it puts before a text."""
    if isinstance(step, list):
        return [kept for one in step if (kept := _without_prefix(one)) is not None]
    if not isinstance(step, dict):
        return step
    if step.get("type") == "Prepend":
        return None
    step = {name: _without_prefix(value) for name, value in step.items()}
    if "prepend_scheme" in step:
        step["prepend_scheme"] = "never"
    if "add_prefix_space" in step:
        step["add_prefix_space"] = False
    return step


def _chat_template(inner: PreTrainedTokenizerFast) -> str | None:
    """The template for plain conversations; some folders have others beside it, by name."""
    template = inner.chat_template
    return (template.get("default") if isinstance(template, dict) else template) or None


def _load(folder: Path) -> PreTrainedTokenizerFast:
    if not folder.is_dir():
        raise StartError(f"{folder}: no such folder; set COSERVE_MODEL_PATH to a Hugging Face model folder")
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise StartError(f"{path}: no such file; the model folder must have a fast tokenizer (tokenizer.json)")
    try:
        loaded: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception for a broken file
        raise StartError(f"{path}: cannot be read as a tokenizer ({error}); copy the model folder again") from None
    return loaded
