"""A JSONL file as tokenised samples: what a line may be, and what is said about one that cannot be used.

The file is read twice: once to check every line, once more line by line as shards are made, so that memory does not
grow with it.
"""

from __future__ import annotations

import json
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from coserve_agent.errors import DatasetError
from coserve_agent.tokenizer import ChatTemplateError, Tokenizer
from coserve_agent.unicode import surrogate_in_json
from coserve_api.job import DatasetFormat, FailedReason, OnInvalid
from coserve_api.shards import Sample

NOT_FOUND, INVALID = FailedReason.DATASET_NOT_FOUND, FailedReason.INVALID_DATASET
MAX_LINE_BYTES = 16 << 20
_BOM = b"\xef\xbb\xbf"


class LineError(Exception):
    """What is wrong with one line, and the remedy."""


@dataclass(frozen=True)
class Reader:
    """Turns lines into samples.

    Args:
        max_length: tokens a sample may have.
    """

    tokenizer: Tokenizer
    format: DatasetFormat
    max_length: int

    def sample(self, number: int, raw: bytes) -> Sample:
        """The sample of line `number`. Raises LineError."""
        row = _parse(raw)
        if self.format is DatasetFormat.MESSAGES:
            tokens, weights = self._messages(row)
        elif self.format is DatasetFormat.PROMPT_COMPLETION:
            tokens, weights = self._prompt_completion(row)
        else:
            tokens, weights = self._text(row)
        if len(tokens) > self.max_length:
            raise LineError(
                f"has {len(tokens)} tokens, more than dataset.maxSequenceLength {self.max_length}; "
                "shorten it, raise the limit, or set dataset.onInvalid: Skip"
            )
        if weights:
            weights[0] = 0.0  # nothing predicts the first token
        if not any(weights):
            raise LineError("has no token to learn; give it a non-empty answer")
        return Sample(number, tuple(tokens), tuple(weights))

    def _messages(self, row: dict[str, Any]) -> tuple[list[int], list[float]]:
        messages = row.get("messages")
        if not isinstance(messages, list) or not messages:
            raise LineError(f"messages is {_show(messages)}; it must be a list of {{role, content}} objects")
        for n, message in enumerate(messages):
            if not isinstance(message, dict):
                raise LineError(f"messages[{n}] is {_show(message)}; it must be an object with role and content")
            for field in ("role", "content"):
                if not isinstance(message.get(field), str):
                    raise LineError(f"messages[{n}].{field} is {_show(message.get(field))}; it must be a string")
        if not any(message["role"] == "assistant" for message in messages):
            raise LineError("messages has no assistant message, so there is nothing to learn; add one")
        try:
            rendered = self.tokenizer.render_training(messages)
        except ChatTemplateError as error:
            raise LineError(f"messages: {error}; change the messages to what the model's chat template takes") from None
        return rendered.tokens, [float(flag) for flag in rendered.supervised]

    def _prompt_completion(self, row: dict[str, Any]) -> tuple[list[int], list[float]]:
        for field in ("prompt", "completion"):
            if not isinstance(row.get(field), str):
                raise LineError(f"{field} is {_show(row.get(field))}; it must be a string")
        if not row["completion"]:
            raise LineError("completion is empty, so there is nothing to learn; give it text")
        prompt = self.tokenizer.encode(row["prompt"])
        answer = self.tokenizer.encode(row["completion"], add_special_tokens=False) + self._end()
        return prompt + answer, [0.0] * len(prompt) + [1.0] * len(answer)

    def _text(self, row: dict[str, Any]) -> tuple[list[int], list[float]]:
        if not isinstance(row.get("text"), str):
            raise LineError(f"text is {_show(row.get('text'))}; it must be a string")
        if not row["text"]:
            raise LineError("text is empty; give it content or delete the line")
        tokens = self.tokenizer.encode(row["text"])
        tokens += [] if tokens[-1:] == self._end() else self._end()
        return tokens, [1.0] * len(tokens)

    def _end(self) -> list[int]:
        return [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]


class Dataset:
    """The usable lines of a file, found by position. `skipped` counts the others, under the policy Skip.

    Raises:
        DatasetError: no such file, no usable line, or a line that cannot be used under the policy Fail.
    """

    def __init__(
        self, path: Path, tokenizer: Tokenizer, format: DatasetFormat, max_length: int, on_invalid: OnInvalid
    ) -> None:
        self._path = path
        self.skipped = 0
        self._first_problem = ""
        self._offsets, self._crcs = array("q"), array("Q")
        self._index: dict[int, int] = {}
        self._reader = Reader(tokenizer, format, max_length)
        for number, offset, raw in self._lines():
            self._check(number, offset, raw, on_invalid)
        if not self._index:
            problem = (
                f"none of its {self.skipped} lines can be used; {self._first_problem}"
                if self.skipped
                else "it is empty"
            )
            raise DatasetError(INVALID, f"{path}: {problem}")

    @property
    def ids(self) -> tuple[int, ...]:
        """Line numbers, from 1, of the usable lines, ascending."""
        return tuple(self._index)

    @property
    def format(self) -> DatasetFormat:
        return self._reader.format

    def samples(self, ids: tuple[int, ...]) -> list[Sample]:
        """Read these lines again. DatasetError if the file changed meanwhile."""
        try:
            with self._path.open("rb") as file:
                return [self._again(file, number) for number in ids]
        except OSError as error:
            raise _unreadable(self._path, error) from None

    def _again(self, file: Any, number: int) -> Sample:
        place = self._index[number]
        file.seek(self._offsets[place])
        raw = file.readline(MAX_LINE_BYTES + 1)
        if zlib.crc32(raw) != self._crcs[place]:
            raise DatasetError(
                INVALID,
                f"{self._path}, line {number}: changed while the job runs; restore the file or make a new job",
                number,
            )
        return self._reader.sample(number, raw)

    def _check(self, number: int, offset: int, raw: bytes, on_invalid: OnInvalid) -> None:
        try:
            if self._reader.format is DatasetFormat.AUTO:
                self._reader = replace(self._reader, format=self._detect(number, _parse(raw)))
            self._reader.sample(number, raw)
        except LineError as error:
            if on_invalid is OnInvalid.FAIL:
                raise DatasetError(INVALID, f"{self._path}, line {number}: {error}", number) from None
            self._first_problem = self._first_problem or f"line {number}: {error}"
            self.skipped += 1
            return
        self._index[number] = len(self._offsets)
        self._offsets.append(offset)
        self._crcs.append(zlib.crc32(raw))

    def _detect(self, number: int, row: dict[str, Any]) -> DatasetFormat:
        """The format by the fields of the first line that is JSON."""
        if "messages" in row:
            return DatasetFormat.MESSAGES
        if "prompt" in row and "completion" in row:
            return DatasetFormat.PROMPT_COMPLETION
        if "text" in row:
            return DatasetFormat.TEXT
        fields = ", ".join(sorted(row)[:10]) or "no field"
        raise DatasetError(
            INVALID,
            f"{self._path}, line {number}: has {fields}; it must have messages, prompt and completion, or text",
            number,
        )

    def _lines(self) -> Iterator[tuple[int, int, bytes]]:
        """Number, offset and bytes of each line that is not blank."""
        if not self._path.is_file():
            what = (
                "is a folder; name the file"
                if self._path.is_dir()
                else "no such file; check dataset.uri and what the volume holds"
            )
            raise DatasetError(NOT_FOUND, f"{self._path}: {what}")
        try:
            with self._path.open("rb") as file:
                number = offset = 0
                while raw := file.readline(MAX_LINE_BYTES + 1):
                    number += 1
                    if len(raw) > MAX_LINE_BYTES:
                        raise DatasetError(
                            INVALID, f"{self._path}, line {number}: longer than {MAX_LINE_BYTES} bytes", number
                        )
                    if raw.strip():
                        yield number, offset, raw
                    offset += len(raw)
        except OSError as error:
            raise _unreadable(self._path, error) from None


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        text = raw.removeprefix(_BOM).decode()
        row = json.loads(text)
    except UnicodeDecodeError as error:
        raise LineError(f"is not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise LineError(f"is not JSON ({error}); each line must be one JSON object") from None
    if not isinstance(row, dict):
        raise LineError(f"is a JSON {type(row).__name__}; each line must be one JSON object")
    found = surrogate_in_json(text, row)
    if found is not None:
        raise LineError(str(found))
    return row


def _show(value: object) -> str:
    if value is None:
        return "missing"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _unreadable(path: Path, error: OSError) -> DatasetError:
    return DatasetError(NOT_FOUND, f"{path}: cannot be read ({error.strerror}); check the volume and its permissions")
