"""How a choice of an answer is written, in the form of a chat or of a completion."""

from __future__ import annotations

from typing import Any

from coserve_agent.generation.generation import Piece
from coserve_agent.openai.logprobs import Writer
from coserve_agent.openai.message import Message
from coserve_agent.requests.chat import ChatRequest
from coserve_agent.requests.common import Common
from coserve_agent.requests.prompts import Prompt
from coserve_engine.messages import FinishReason


class Choice:
    """One choice of an answer, and how its parts are written."""

    def __init__(self, index: int, prompt: Prompt, request: Common, writer: Writer) -> None:
        self._index, self._prompt, self._writer = index, prompt, writer
        self._chat = isinstance(request, ChatRequest)
        self._logprobs = request.output_logprobs is not None
        self._ids = bool(request.return_token_ids)
        self._message = None if prompt.reading.plain else Message(prompt.reading)

    def whole(self, piece: Piece, finish: str | None) -> dict[str, Any]:
        """An entry of `choices` with the whole text."""
        if not self._chat:
            return self._entry({"text": piece.text}, piece, finish, first=True)
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        if self._message is not None:
            message = self._message.whole(piece.text)
        return self._entry({"message": message}, piece, self._finish(finish), first=True)

    def chunks(self, piece: Piece, finish: str | None, *, first: bool) -> list[dict[str, Any]]:
        """The same for the next piece of a stream. A chat says by an entry of its own that it has ended.

        A piece without characters is written too: clients measure the time between tokens by it.
        """
        if not self._chat:
            return [self._entry({"text": piece.text}, piece, finish, first=first)]
        entries = []
        deltas = self._deltas(piece.text, finish)
        if first or deltas or piece.tokens or (self._ids and piece.ids) or finish is None:
            role = {"role": "assistant"} if first else {}
            begin, *more = deltas or [{} if self._message is not None else {"content": ""}]
            entries.append(self._entry({"delta": {**role, **begin}}, piece, None, first=first))
            entries += [self._entry({"delta": one}, Piece(""), None, first=False) for one in more]
        if finish is not None:
            entries.append(self._entry({"delta": {}}, Piece(""), self._finish(finish), first=False))
        return entries

    def _deltas(self, text: str, finish: str | None) -> list[dict[str, Any]]:
        if self._message is not None:
            return self._message.deltas(text, ended=finish is not None)
        return [{"content": text}] if text else []

    def _finish(self, finish: str | None) -> str | None:
        """OpenAI's reason for an answer that ended with calls."""
        calls = self._message is not None and self._message.calls
        return "tool_calls" if finish == FinishReason.STOP.value and calls else finish

    def _entry(self, answer: dict[str, Any], piece: Piece, finish: str | None, *, first: bool) -> dict[str, Any]:
        logprobs = None
        if self._logprobs and (piece.tokens or not self._chat):
            logprobs = self._writer.chat(piece.tokens) if self._chat else self._writer.completion(piece.tokens)
        entry = {"index": self._index, **answer, "logprobs": logprobs, "finish_reason": finish}
        if self._ids:
            entry["token_ids"] = list(piece.ids)
            if first and not self._chat:
                entry["prompt_token_ids"] = list(self._prompt.tokens)
        return entry
