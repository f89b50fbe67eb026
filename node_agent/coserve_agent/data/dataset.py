"""The usable lines of a data set's files, found by number.

The files are read twice: once to check every line, once more line by line as shards are made, so that memory grows
with the number of lines alone: of each some numbers are kept.
"""

from __future__ import annotations

import hashlib
import zlib
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from coserve_agent.data.files import DataFile, Line
from coserve_agent.data.problems import LineError, Problems, Refusal
from coserve_agent.data.reader import Reader, Reading
from coserve_agent.data.rows import is_blank
from coserve_agent.errors import DatasetError
from coserve_api.job import OnInvalid
from coserve_api.job_status import FailedReason
from coserve_contract.shards import Sample

INVALID = FailedReason.INVALID_DATASET
Seen = Callable[[DataFile, int, Reading | LineError], None]
"""Is called with each line as it is first read: its file, its number there, and what it gives."""


@dataclass(frozen=True, slots=True)
class LineSize:
    """What a line gives: samples, their tokens together, and those of the longest."""

    samples: int
    tokens: int
    longest: int


class Dataset:
    """The usable lines of some files. `problems` counts the others, under the policy Skip.

    A line's id counts the lines of all files in their order, from 1: of a single file it is the line's number.

    Args:
        seen: who wants to see what each line gives.

    Raises:
        DatasetError: a file cannot be read, no line is usable, or one cannot be used under the policy Fail.
    """

    def __init__(
        self, files: Sequence[DataFile], reader: Reader, on_invalid: OnInvalid, seen: Seen | None = None
    ) -> None:
        self.files = files
        self._reader = reader
        self._on_invalid = on_invalid
        self._seen: Seen = seen or (lambda file, number, found: None)
        self.problems = Problems()
        self._begins: list[int] = []
        """How many lines stand before each file."""
        self._ids, self._offsets, self._crcs = array("q"), array("q"), array("I")
        self._samples, self._tokens, self._longest = array("I"), array("I"), array("I")
        self._lines = 0
        for file in files:
            self._begins.append(self._lines)
            for line in file.lines():
                self._lines += 1
                if line.raw is None or not is_blank(line.raw):
                    self._take(file, self._lines, line)
        if not self._ids:
            self._refuse_all()

    @property
    def ids(self) -> tuple[int, ...]:
        """Of the usable lines, ascending."""
        return tuple(self._ids)

    @property
    def reader(self) -> Reader:
        """With the format that was found."""
        return self._reader

    @property
    def digest(self) -> str:
        """sha256 of the usable lines, by their numbers and checksums."""
        return hashlib.sha256(self._ids.tobytes() + self._crcs.tobytes()).hexdigest()

    def size(self, id: int) -> LineSize:
        """Of a usable line."""
        place = self._place(id)
        return LineSize(self._samples[place], self._tokens[place], self._longest[place])

    def samples(self, ids: Sequence[int]) -> list[Sample]:
        """Read these lines again. DatasetError if a file changed meanwhile."""
        return [sample for id in ids for sample in self._again(id)]

    def where(self, id: int) -> tuple[DataFile, int]:
        """The file of a line, and its number there."""
        index = bisect_right(self._begins, id - 1) - 1
        return self.files[index], id - self._begins[index]

    def spans(self) -> list[tuple[DataFile, int, int]]:
        """Of each file the ids of its first and last line; the last is before the first where it has none."""
        ends = [*self._begins[1:], self._lines]
        return [(file, begin + 1, end) for file, begin, end in zip(self.files, self._begins, ends, strict=True)]

    def _place(self, id: int) -> int:
        place = bisect_left(self._ids, id)
        if place == len(self._ids) or self._ids[place] != id:
            raise KeyError(id)
        return place

    def _again(self, id: int) -> tuple[Sample, ...]:
        place = self._place(id)
        file, number = self.where(id)
        raw = file.read(self._offsets[place])
        try:
            if zlib.crc32(raw) != self._crcs[place]:
                _fail(file, number, "changed while the job runs; restore the file or make a new job")
            return self._reader.read(id, raw).samples
        except LineError as error:
            _fail(file, number, f"could be used once and cannot again: {error.public}")

    def _take(self, file: DataFile, id: int, line: Line) -> None:
        try:
            reader = self._reader.detected(line.raw)
            reading = reader.read(id, line.raw)
            self._reader = reader  # only a usable line says which format it is
        except LineError as error:
            self._seen(file, line.number, error)
            if self._on_invalid is OnInvalid.FAIL:
                _fail(file, line.number, error.public)
            self.problems.add_line(Refusal(str(file.path), line.number, error.reason, error.public))
            return
        self._seen(file, line.number, reading)
        self._take_turns(file, line.number, reading)
        assert line.raw is not None
        self._ids.append(id)
        self._offsets.append(line.offset)
        self._crcs.append(zlib.crc32(line.raw))
        self._samples.append(len(reading.samples))
        lengths = [len(sample.tokens) for sample in reading.samples]
        self._tokens.append(sum(lengths))
        self._longest.append(max(lengths))

    def _take_turns(self, file: DataFile, number: int, reading: Reading) -> None:
        """Note the turns that are refused alone, and what the row has for nobody."""
        for error in reading.refused:
            if self._on_invalid is OnInvalid.FAIL:
                _fail(file, number, error.public)
            self.problems.add_turn(Refusal(str(file.path), number, error.reason, error.public))
        self.problems.add_fields(reading.unknown)
        self.problems.unended += sum(sample.tokens[-1] not in self._reader.renderer.ends for sample in reading.samples)

    def _refuse_all(self) -> NoReturn:
        first = self.problems.first[:1]
        several = len(self.files) > 1
        name = f"{self.files[0].path}{' and the other files' if several else ''}"
        if not first:
            raise DatasetError(INVALID, f"{name}: it is empty")
        where = str(first[0]) if several else f"line {first[0].line}: {first[0].message}"
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.problems.by_reason.most_common())
        message = f"{name}: none of its {self.problems.lines} lines can be used ({reasons}); {where}"
        raise DatasetError(INVALID, message)


def _fail(file: DataFile, number: int, what: str) -> NoReturn:
    raise DatasetError(INVALID, f"{file.path}, line {number}: {what}", number)
