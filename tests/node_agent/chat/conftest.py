"""Agents on models with tokenizers of both kinds: one that writes bytes, and one like Llama 2's, whose decoder strips a
text's first space and which spells in bytes what it has no token for. Beside each stands transformers' idea of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

LETTERS = {letter: byte for byte, letter in bytes_to_unicode().items()}


class Server:
    """An agent on a model folder, and transformers' idea of the same folder. Use it in a `with` block."""

    def __init__(self, url: str, folder: Path) -> None:
        self.http = httpx.Client(base_url=url, timeout=60)
        self.reference = AutoTokenizer.from_pretrained(folder)
        self.model = LlamaForCausalLM.from_pretrained(folder)
        self.strips = self.reference.bos_token is not None
        """Whether its tokenizer is the one like Llama 2's."""

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.http.close()

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        answer = self.http.post(f"/v1/{path}", json={"model": "base", "ignore_eos": True, **body})
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def choices(self, path: str, **body: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.post(path, **body)["choices"]
        return found

    def choice(self, **body: Any) -> dict[str, Any]:
        (one,) = self.choices("completions", **body)
        return one

    def streamed(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """Chunks of a stream."""
        with self.http.stream(
            "POST", f"/v1/{path}", json={"model": "base", "ignore_eos": True, "stream": True, **body}
        ) as answer:
            assert answer.status_code == 200, answer.read()
            lines = [line[6:] for line in answer.iter_lines() if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]

    def streamed_choices(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The choices of a stream put together, as clients do it."""
        found: dict[int, dict[str, Any]] = {}
        for chunk in self.streamed(path, **body):
            (part,) = chunk["choices"]
            whole = found.setdefault(part["index"], {"index": part["index"], "text": "", "logprobs": None})
            whole["text"] += part["text"] if "text" in part else part["delta"].get("content", "")
            whole["finish_reason"] = part["finish_reason"]
            for name in {"token_ids", "prompt_token_ids"} & part.keys():
                whole[name] = whole.get(name, []) + part[name]
            for name, values in (part["logprobs"] or {}).items():
                whole["logprobs"] = whole["logprobs"] or {}
                whole["logprobs"][name] = whole["logprobs"].get(name, []) + values if values is not None else None
        return [found[index] for index in sorted(found)]

    def logp(self, tokens: list[int]) -> torch.Tensor:
        """Log-probabilities [tokens, vocab]."""
        with torch.no_grad():
            return torch.log_softmax(self.model(torch.tensor([tokens])).logits[0], -1)

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.reference(text)["input_ids"]
        return found

    def bytes_of(self, token: int) -> bytes:
        """A token's bytes by its piece."""
        piece: str = self.reference.convert_ids_to_tokens(token)
        if token in self.reference.all_special_ids:
            return piece.encode()
        if not self.strips:
            return bytes(LETTERS[letter] for letter in piece)
        return bytes.fromhex(piece[3:5]) if piece.startswith("<0x") else piece.replace("▁", " ").encode()

    def part_of(self, token: int) -> bytes:
        """What it adds to a text."""
        return b"" if token in self.reference.all_special_ids else self.bytes_of(token)

    def bias(self, piece: str) -> dict[str, float]:
        """Makes a model say one token and no other."""
        token = self.reference.convert_tokens_to_ids(piece)
        assert self.reference.convert_ids_to_tokens(token) == piece
        return {str(token): 100}


@pytest.fixture(scope="session")
def open_server(start_agent: Callable[..., Any]) -> Callable[[Path], Server]:
    return lambda folder: Server(start_agent(model_path=folder).url, folder)


@pytest.fixture(scope="session")
def llama(open_server: Callable[[Path], Server], sentencepiece: Path) -> Iterator[Server]:
    with open_server(sentencepiece) as server:
        yield server


@pytest.fixture(scope="session")
def bytelevel(served: Any, model_folder: Path) -> Iterator[Server]:
    with Server(served.url, model_folder) as server:
        yield server


@pytest.fixture(params=("llama", "bytelevel"))
def server(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)
