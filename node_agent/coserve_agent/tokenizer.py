"""Text to tokens and back, from the model's own folder: local files only, never code from it, and without torch.

`PreTrainedTokenizerFast` reads tokenizer.json as it is. (`AutoTokenizer` would import torch, which the feeder must
not need.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast

from coserve_agent import generation_config
from coserve_agent.chat_format import Message, roles_in_parts, shaped
from coserve_agent.errors import AgentError, StartError
from coserve_agent.pieces import Pieces
from coserve_agent.roles import Roles
from coserve_agent.unicode import lone_surrogate


class ChatTemplateError(AgentError):
    """The model's chat template refuses these messages; the message is the template's own."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens; `supervised[i]` says whether the assistant wrote `tokens[i]` (its end token
    included).
    """

    tokens: list[int]
    supervised: list[bool]


class Placed(NamedTuple):
    """Tokens of a text, and the character at which each begins; those that stand for no character where they are."""

    tokens: list[int]
    starts: list[int]


class Tokenizer:
    """The model's tokenizer and chat template.

    Raises:
        StartError: a file of the folder is missing or broken.
    """

    def __init__(self, folder: Path) -> None:
        self._inner = _load(folder)
        self._backend = self._inner.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._template = _chat_template(self._inner)
        self._marks_generation = "endgeneration" in (self._template or "")
        self.size = max((*self._backend.get_vocab(with_added_tokens=True).values(), -1)) + 1
        self.eos_token_id: int | None = self._inner.eos_token_id
        self.stop_token_ids = generation_config.end_tokens(folder)
        self.pieces = Pieces(self._backend)
        content = f"{self._backend.to_str()}\0{self._template or ''}"
        self.digest = hashlib.sha256(content.encode()).hexdigest()
        self._in_parts: frozenset[str] = frozenset()
        if self._template:
            self._in_parts = roles_in_parts(lambda messages: self._apply(messages, tokenize=False), ChatTemplateError)
        self._roles = Roles(self._text_of, ChatTemplateError)

    @property
    def written_fields(self) -> frozenset[str]:
        """What the chat template writes beside roles and contents, of all that we could give it."""
        template = self._template or ""
        return frozenset(name for name in ("tools", "tool_calls", "reasoning_content") if name in template)

    def check_fits(self, vocab_size: int, folder: Path) -> None:
        """Refuse end tokens with ids that the model has no row for. The vocabulary may have some: a prompt with one of
        them is refused when it comes.
        """
        wrong = [token for token in self.stop_token_ids if token >= vocab_size]
        if wrong:
            raise StartError(
                f"{folder / generation_config.FILE}: eos_token_id has {wrong[0]} but the model's vocab_size is "
                f"{vocab_size}; copy the file from the same model, or take the id out"
            )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Tokens of plain text, with what the tokenizer puts around a prompt (often a begin token)."""
        # A batch of one, because only encode_batch lets other threads run meanwhile.
        return list(self._backend.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids)

    def encode_placed(self, text: str) -> Placed:
        """The same, and where in the text each token begins."""
        encoding = self._backend.encode_batch([text])[0]
        starts, end = [], 0
        for (first, last), added in zip(encoding.offsets, encoding.special_tokens_mask, strict=True):
            # Some tokenizers leave spaces out of what they say a token covers; the tokens of one character share it.
            starts.append(end if added else min(first, end))
            end = max(end, last)
        return Placed(list(encoding.ids), starts)

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._backend.decode(list(tokens), skip_special_tokens=skip_special_tokens)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a conversation up to where the assistant begins to answer. A message's content is a string or a
        list of text parts, whichever the template takes.

        Raises:
            ChatTemplateError: there is no template, or it refuses the messages.
        """
        text = self._render(messages, add_generation_prompt=True)
        return self.encode(text, add_special_tokens=False)

    def render_training(self, messages: Sequence[Message], tools: Sequence[Message] = ()) -> Rendered:
        """Tokens of a whole conversation and which of them are the assistant's.

        A template with {% generation %} blocks says so itself; otherwise a turn's text is what the template writes
        after the prompt for it, up to the end of the turn.

        Raises:
            ChatTemplateError: there is no template, or it refuses the messages, or writes earlier turns differently
            later.
        """
        if self._marks_generation:
            encoded = self._call_template(
                messages,
                tools=list(tools) or None,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                add_generation_prompt=False,
            )
            return Rendered(list(encoded["input_ids"]), [bool(flag) for flag in encoded["assistant_masks"]])
        text = self._render(messages, tools=tools)
        spans = [
            self._turn_span(messages, n, text, tools)
            for n, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        encoding = self._backend.encode(text, add_special_tokens=False)
        flags = [any(start <= first and last <= end for start, end in spans) for first, last in encoding.offsets]
        return Rendered(list(encoding.ids), flags)

    def _turn_span(
        self, messages: Sequence[Message], index: int, text: str, tools: Sequence[Message]
    ) -> tuple[int, int]:
        before = self._render(messages[:index], add_generation_prompt=True, tools=tools) if index else ""
        through = self._render(messages[: index + 1], tools=tools)
        if not (through.startswith(before) and text.startswith(through.rstrip())):
            raise ChatTemplateError(
                f"the chat template writes message {index} differently inside a longer conversation, so its tokens "
                "cannot be told apart: add {% generation %} blocks to the template, or end the conversation there"
            )
        return len(before), len(through)

    def _render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Sequence[Message] = ()
    ) -> str:
        options = {"tools": list(tools) or None, "tokenize": False, "add_generation_prompt": add_generation_prompt}
        return _whole(str(self._call_template(messages, **options)))

    def _call_template(self, messages: Sequence[Message], **options: Any) -> Any:
        if not self._template:
            raise ChatTemplateError("the model's folder has no chat template; use /v1/completions or the text format")
        return self._apply(self._shaped(self._roles.as_written(messages)), **options)

    def _text_of(self, messages: Sequence[Message]) -> str:
        return _whole(str(self._apply(self._shaped(messages), tokenize=False)))

    def _shaped(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        return [shaped(message, self._in_parts) for message in messages]

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        try:
            return self._inner.apply_chat_template([dict(message) for message in messages], **options)
        except TemplateError as error:
            raise ChatTemplateError(str(error) or type(error).__name__) from None
        except Exception as error:
            # A template is a program over the client's data: whatever it raises is the data's fault, not the server's.
            raise ChatTemplateError(
                f"the chat template does not accept these messages: {type(error).__name__}: {error}"
            ) from None


def _whole(text: str) -> str:
    if lone_surrogate(text) is not None:
        raise ChatTemplateError("the chat template writes half of a surrogate pair, which is no character")
    return text


def _chat_template(inner: PreTrainedTokenizerFast) -> str | None:
    """The template for plain conversations; some folders have others beside it, by name."""
    template = inner.chat_template
    return template.get("default") if isinstance(template, dict) else template


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
