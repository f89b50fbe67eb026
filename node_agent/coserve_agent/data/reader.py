"""A line as samples: its row, rendered to tokens, in the model's vocabulary and within the length that is allowed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from coserve_agent.data.files import MAX_LINE_BYTES
from coserve_agent.data.formats import Rules, detect, read
from coserve_agent.data.problems import LineError, Reason
from coserve_agent.data.rendering import Conversation, Rendered, Renderer, RenderingError
from coserve_agent.data.rows import Completion, Text, parse
from coserve_api.job import DatasetFormat, Learn
from coserve_contract.shards import Sample

T = TypeVar("T")
NAME = "messages[].name"
"""Counted where the chat template does not write it, like the fields of a row that mean nothing here."""


@dataclass(frozen=True)
class Reading:
    """What a line gives: at least one sample; why others of its turns are refused; fields that mean nothing here."""

    samples: tuple[Sample, ...]
    refused: tuple[LineError, ...] = ()
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reader:
    """Turns lines into samples.

    Args:
        max_length: tokens that a sample may have.
        vocab_size: of the model; tokens at or above it are refused.
    """

    renderer: Renderer
    format: DatasetFormat
    learn: Learn
    max_length: int
    vocab_size: int

    @property
    def digest(self) -> str:
        """sha256 of what decides, beside tokenizer, template and file, how a row becomes tokens."""
        return hashlib.sha256(f"{self.renderer.digest}\0{self.format}\0{self.learn}".encode()).hexdigest()

    def detected(self, raw: bytes | None) -> Reader:
        """This reader, with the format of the line `raw` if it has none yet. Raises LineError."""
        if self.format is not DatasetFormat.AUTO:
            return self
        return replace(self, format=_guarded(lambda: detect(parse(_whole(raw)))))

    def read(self, id: int, raw: bytes | None) -> Reading:
        """The samples of a line.

        Args:
            id: of the line in the data set.
            raw: its bytes; None: it is longer than MAX_LINE_BYTES.

        Raises:
            LineError: whatever is wrong with it.
        """
        return _guarded(lambda: self._read(id, raw))

    def _read(self, id: int, raw: bytes | None) -> Reading:
        tokenizer = self.renderer.tokenizer
        rules = Rules(tokenizer.written_fields, self.learn)
        row, unknown = read(self.format, parse(_whole(raw)), rules)
        try:
            match row:
                case Conversation():
                    rendered = self.renderer.chat(row)
                case Completion():
                    rendered = [self.renderer.completion(row.prompt, row.completion)]
                case Text():
                    rendered = [self.renderer.text(row.text)]
        except RenderingError as error:
            raise LineError(Reason.TEMPLATE, str(error), error.public) from None
        for one in rendered:
            self._check_vocabulary(one.tokens)
            if not isinstance(row, Text):
                self._check_said(one)
        samples, refused = [], []
        for one in rendered:
            try:
                samples.append(self._sample(id, one, len(rendered) > 1))
            except LineError as error:
                refused.append(error)
        if not samples:
            raise refused[0] if refused else LineError(Reason.NOTHING_TO_LEARN, "gives nothing to learn")
        if isinstance(row, Conversation) and any(map(tokenizer.loses_name, row.messages)):
            unknown = (*unknown, NAME)
        return Reading(tuple(samples), tuple(refused), unknown)

    def _check_vocabulary(self, tokens: list[int]) -> None:
        wrong = next((token for token in tokens if not 0 <= token < self.vocab_size), None)
        if wrong is not None:
            raise LineError(
                Reason.VOCABULARY,
                f"has token {wrong}, which the model has no row for (vocab_size is {self.vocab_size}): its tokenizer "
                "knows more than the model; take the text of that token out, or mend the model's folder",
            )

    def _check_said(self, rendered: Rendered) -> None:
        """Refuse an answer of which nothing but its end would be learned."""
        learned = [token for token, flag in zip(rendered.tokens[1:], rendered.learned[1:], strict=True) if flag]
        if not all(token in self.renderer.ends for token in learned):
            return
        message = "would teach an answer's end alone; give it more of an answer"
        if rendered.learned[0]:
            message = (
                "would teach an answer's end alone, since nothing stands before its only token that could predict it; "
                "give it a prompt, or more of an answer"
            )
        raise LineError(Reason.NOTHING_TO_LEARN, message)

    def _sample(self, id: int, rendered: Rendered, several: bool) -> Sample:
        tokens = rendered.tokens
        where = f"turn {rendered.turn} " if several else ""
        if len(tokens) > self.max_length:
            raise LineError(
                Reason.TOO_LONG,
                f"{where}has {len(tokens)} tokens, more than dataset.maxSequenceLength {self.max_length}; "
                "shorten it, raise the limit, or set dataset.onInvalid: Skip",
            )
        # Nothing predicts the first token.
        weights = (0.0, *(float(flag) for flag in rendered.learned[1:]))[: len(tokens)]
        if not any(weights):
            raise LineError(Reason.NOTHING_TO_LEARN, f"{where}has no token to learn; give it a non-empty answer")
        return Sample(id, tuple(tokens), weights, rendered.turn)


def _whole(raw: bytes | None) -> bytes:
    if raw is None:
        raise LineError(
            Reason.TOO_LARGE,
            f"is longer than {MAX_LINE_BYTES} bytes; split the row, or set dataset.onInvalid: Skip",
        )
    return raw


def _guarded(work: Callable[[], T]) -> T:
    """The result of `work` on one line; whatever it raises is that line's error."""
    try:
        return work()
    except (LineError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic inside the tokenizer is no Exception
        name, remedy = type(error).__name__, "mend or delete it"
        message = f"cannot be read ({name}: {str(error)[:200]}); {remedy}"
        raise LineError(Reason.UNREADABLE, message, f"cannot be read ({name}); {remedy}") from None
