"""A data set as its job would see it: some lines with their tokens, each refused line, and what all of it costs."""

from __future__ import annotations

import sys
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from coserve_agent.chat.end_tokens import end_tokens
from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.chat.variables import TemplateVariableError
from coserve_agent.data.dataset import Dataset
from coserve_agent.data.files import DataFile, find
from coserve_agent.data.material import Material
from coserve_agent.data.order import StepOrder
from coserve_agent.data.problems import LineError, Reason
from coserve_agent.data.reader import Reader, Reading
from coserve_agent.data.rendering import Renderer
from coserve_agent.data.shown import Colours, Marks, one_line, pieces_of
from coserve_agent.errors import DatasetError, StartError
from coserve_agent.model.vocabulary import vocab_size
from coserve_agent.settings import TerminalSettings
from coserve_api.job import DatasetFormat, Learn, OnInvalid
from coserve_api.job_status import FailedReason
from coserve_contract.shards import Sample

FIT, UNFIT, WRONG = 0, 1, 2
_LINES = 3
_COUNT_EVERY = 500
"""Lines between two words of progress."""


@dataclass(frozen=True)
class Looked:
    """What to read, as a job would with these fields, and which lines to show: the first `lines` usable ones (None:
    three), or those numbers in `line`.
    """

    files: tuple[Path, ...]
    model: Path
    format: DatasetFormat
    learn: Learn
    max_length: int
    template_variables: Mapping[str, Any]
    date: date | None
    batch_size: int
    epochs: int
    lines: int | None
    line: tuple[int, ...]
    ids: bool


def preview(options: Looked) -> int:
    """Print all that is to be said of the data set. Returns the exit status."""
    style = Colours() if sys.stdout.isatty() and TerminalSettings().colours else Marks()
    try:
        if not options.model.is_dir():
            raise StartError(f"--model is {str(options.model)!r}: no such folder; name a Hugging Face model folder")
        tokenizer = Tokenizer(options.model)
        day = options.date or datetime.now(UTC).date()
        renderer = Renderer(tokenizer, end_tokens(options.model, tokenizer), options.template_variables, day)
        reader = Reader(renderer, options.format, options.learn, options.max_length, vocab_size(options.model))
        files, left = _found(options.files)
    except TemplateVariableError as error:
        return _wrong(f"dataset.{error}")
    except (StartError, DatasetError) as error:
        return _wrong(str(error))
    view = _View(style, tokenizer, options, several=len(files) > 1)
    if options.line or options.lines != 0:
        print(style.legend)
    try:
        try:
            dataset = Dataset(files, reader, OnInvalid.SKIP, view.seen)
        finally:
            view.wipe()
        order = StepOrder(dataset.ids, options.batch_size, 0, options.epochs, None)
        material = Material(dataset, order, dataset, (), tokenizer.digest, left=tuple(left))
        print(f"\n{view.name}: {dataset.reader.format}")
        for head, text in view.summary(material):
            print(f"  {head:<9} {one_line(text)}")
        if tokenizer.template is not None and tokenizer.template.asks_for_the_date:
            print(f"  date      the chat template asks for it and gets {day}; a job's is the day on which it is made")
        material.check_sizes()
    except DatasetError as error:
        if error.reason is FailedReason.DATASET_NOT_FOUND:
            return _wrong(str(error))
        print(f"\n{style.bad('not fit')}: {one_line(str(error))}")
        return UNFIT
    if missing := view.missing:
        return _wrong(f"--line {missing[0]}: there is no such line, or it is blank")
    if problems := dataset.problems.first[:1]:
        where = f"{problems[0].file}, line {problems[0].line}" if len(files) > 1 else f"line {problems[0].line}"
        print(f"\n{style.bad('not fit')}: dataset.onInvalid Fail would refuse it at {one_line(where)}")
        return UNFIT
    print(f"\n{style.good('fit')}: every line can be learned")
    return FIT


def _found(paths: tuple[Path, ...]) -> tuple[list[DataFile], list[str]]:
    """What the names mean: one, or several that a shell made of a pattern."""
    files, left = list[DataFile](), list[str]()
    for path in sorted(paths):
        more, aside = find(path, Path("/"))
        files, left = [*files, *more], [*left, *aside]
    return files, left


def _wrong(what: str) -> int:
    print(f"Error: {one_line(what)}", file=sys.stderr)
    return WRONG


class _View:
    """Prints lines as they are read, and counts."""

    def __init__(self, style: Marks, tokenizer: Tokenizer, options: Looked, several: bool) -> None:
        self._style, self._tokenizer, self._options, self._several = style, tokenizer, options, several
        self._first = (0 if options.line else _LINES) if options.lines is None else options.lines
        self._left_to_show = set[int](options.line)
        self._counts = sys.stderr.isatty() and TerminalSettings().term != "dumb"
        self._counted = False
        self._read = self._usable = 0
        self._lengths = array("I")
        self._learned = 0
        self._longest = (0, "")
        self._after_tokens = True
        self._over: Counter[Reason] = Counter()
        self.name = one_line(", ".join(map(str, options.files[:3])) + (" …" if len(options.files) > 3 else ""))

    @property
    def missing(self) -> list[int]:
        """The lines that were to be shown and were not there."""
        return sorted(self._left_to_show)

    def wipe(self) -> None:
        """Take the word of progress off the terminal."""
        if self._counted:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        self._counted = False

    def seen(self, file: DataFile, number: int, found: Reading | LineError) -> None:
        self._read += 1
        if self._counts and self._read % _COUNT_EVERY == 0:
            print(f"\r{self._read:,} lines read", end="", file=sys.stderr, flush=True)
            self._counted = True
        where = f"{one_line(str(file.path))}, line {number}" if self._several else f"line {number}"
        chosen = number in self._options.line
        self._left_to_show.discard(number)
        if isinstance(found, LineError):
            self._refused(where, "refused", found)
            return
        self._usable += 1
        chosen |= self._usable <= self._first
        for sample in found.samples:
            learned = sum(map(bool, sample.weights))
            self._lengths.append(len(sample.tokens))
            self._learned += learned
            self._longest = max(self._longest, (len(sample.tokens), where), key=lambda one: one[0])
            if chosen:
                self.wipe()
                turn = f", turn {sample.turn}" if len(found.samples) + len(found.refused) > 1 else ""
                print(f"\n{self._style.title(where + turn)}: {len(sample.tokens)} tokens, {learned} learned")
                self._show(sample)
        for error in found.refused:
            self._refused(where, "an answer refused", error)

    def _refused(self, where: str, what: str, error: LineError) -> None:
        self._over[error.reason] += 1
        self.wipe()
        if self._after_tokens:
            print()
        self._after_tokens = False
        print(f"{self._style.title(where)}: {self._style.bad(what)}, {error.reason}: {one_line(str(error))}")

    def _show(self, sample: Sample) -> None:
        self._after_tokens = True
        pieces = pieces_of(sample, self._tokenizer.pieces)
        if self._options.ids:
            for piece in pieces:
                ids = " ".join(map(str, piece.tokens))
                print(f"  │ {piece.at:>5} {ids:>8}  {self._style.alone(piece)}")
            return
        text = self._style.shown(pieces)
        for line in text.removesuffix("\n").split("\n"):
            print(f"  │ {line}")

    def summary(self, material: Material) -> Iterator[tuple[str, str]]:
        """What there is, what it costs, and what DataReady would say, each with a heading."""
        status, lengths = material.status(), sorted(self._lengths)
        yield "usable", f"{_many(status.samples, 'line')}, {_many(status.sequences, 'sequence')}"
        if status.skipped:
            answers = f" and {_many(status.skipped_turns, 'single answer')}" if status.skipped_turns else ""
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in status.skipped.items())
            yield "refused", f"{_many(status.skipped_lines, 'line')}{answers} ({reasons})"
        half, over = lengths[(len(lengths) - 1) // 2], self._over[Reason.TOO_LONG]
        span = f"{lengths[0]:,} to {lengths[-1]:,} tokens (longest: {self._longest[1]}), half at most {half:,}"
        yield "lengths", f"{span}; {over:,} over the limit of {self._options.max_length:,}"
        epochs, share = self._options.epochs, 100 * self._learned / status.tokens
        steps = f"{_many(status.total_steps // epochs, 'step')} of {_many(self._options.batch_size, 'line')}"
        yield "an epoch", f"{status.tokens:,} tokens, {self._learned:,} of them learned ({share:.0f} %); {steps}"
        if epochs > 1:
            yield _many(epochs, "epoch"), f"{epochs * status.tokens:,} tokens; {_many(status.total_steps, 'step')}"
        if fields := status.unknown_fields:
            named = ", ".join(f"{name} ({count:,})" for name, count in fields.items())
            yield "ignored", f"fields that mean nothing here: {named}"
        for note in status.notes:
            yield "note", note
        if status.samples == 1:
            yield "note", "nothing of one line can be held out: a job needs dataset.evalPercent 0, or more lines"


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
