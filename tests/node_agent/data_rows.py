"""Rows, files of rows, and what becomes of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.data.dataset import Dataset
from coserve_agent.data.files import find
from coserve_agent.data.reader import Reader
from coserve_agent.data.rendering import Conversation, Rendered, Renderer
from coserve_api.job import DatasetFormat, Learn, OnInvalid
from coserve_contract.shards import Sample

TURNS = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four é😀"},
]
GOOD = {"messages": TURNS[:2]}


def line_of(row: object) -> bytes:
    return row if isinstance(row, bytes) else json.dumps(row).encode()


def write(folder: Path, *rows: object, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_bytes(b"".join(line_of(row) + b"\n" for row in rows))
    return path


def renderer_of(tokenizer: Tokenizer) -> Renderer:
    """With the end token that the tokenizer names."""
    return Renderer(tokenizer, () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,))


def reader_of(tokenizer: Tokenizer, **changes: Any) -> Reader:
    """A reader of rows of any format; `changes` are its fields."""
    fields = {"format": DatasetFormat.AUTO, "learn": Learn.ALL, "max_length": 64, "vocab_size": tokenizer.size}
    return Reader(renderer_of(tokenizer), **fields | changes)


def load(path: Path, tokenizer: Tokenizer, on_invalid: OnInvalid = OnInvalid.FAIL, **changes: Any) -> Dataset:
    files, _ = find(path, path.parent)
    return Dataset(files, reader_of(tokenizer, **changes), on_invalid)


def samples_of(tokenizer: Tokenizer, row: object, **changes: Any) -> tuple[Sample, ...]:
    """What a line gives. LineError where it cannot be used."""
    raw = line_of(row)
    return reader_of(tokenizer, **changes).detected(raw).read(1, raw).samples


def learned(tokenizer: Tokenizer, row: object, **changes: Any) -> tuple[str, str]:
    """All text of a row's one sample, and the part of it that is learned."""
    (sample,) = samples_of(tokenizer, row, **changes)
    chosen = [token for token, weight in zip(sample.tokens, sample.weights, strict=True) if weight]
    return tokenizer.decode(sample.tokens, False), tokenizer.decode(chosen, False)


class EachAnswer(Renderer):
    """Makes a sequence of each answer, as where a template writes earlier answers differently later."""

    def chat(self, conversation: Conversation) -> list[Rendered]:
        answers = [n for n, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        made = []
        for turn, n in enumerate(one for one in answers if conversation.learned is None or one in conversation.learned):
            (only,) = super().chat(Conversation(conversation.messages[: n + 1], conversation.tools, frozenset((n,))))
            made.append(replace(only, turn=turn))
        return made
