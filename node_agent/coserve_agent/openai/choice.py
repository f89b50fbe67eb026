"""How a choice of an answer is written, in the form of a chat or of a completion."""

from __future__ import annotations

from typing import Any

from coserve_agent.generation.generation import Piece
from coserve_agent.openai.logprobs import Writer
from coserve_agent.requests.chat import ChatRequest
from coserve_agent.requests.common import Common
from coserve_agent.requests.prompts import Prompt


class Choice:
    """One choice of an answer, and how its parts are written."""

    def __init__(self, index: int, prompt: Prompt, request: Common, writer: Writer) -> None:
        self._index, self._prompt, self._writer = index, prompt, writer
        self._chat = isinstance(request, ChatRequest)
        self._logprobs = request.output_logprobs is not None
        self._ids = bool(request.return_token_ids)

    def whole(self, piece: Piece, finish: str | None) -> dict[str, Any]:
        """An entry of `choices` with the whole text."""
        answer: dict[str, Any] = (
            {"message": {"role": "assistant", "content": piece.text, "refusal": None}}
            if self._chat
            else {"text": piece.text}
        )
        return self._entry(answer, piece, finish, first=True)

    def chunks(self, piece: Piece, finish: str | None, *, first: bool) -> list[dict[str, Any]]:
        """The same for the next piece of a stream. A chat says by an entry of its own that it has ended.

        A piece without characters is written too: clients measure the time between tokens by it.
        """
        if not self._chat:
            return [self._entry({"text": piece.text}, piece, finish, first=first)]
        entries = []
        if first or piece.text or piece.tokens or (self._ids and piece.ids) or finish is None:
            role = {"role": "assistant"} if first else {}
            entries.append(self._entry({"delta": {**role, "content": piece.text}}, piece, None, first=first))
        if finish is not None:
            entries.append(self._entry({"delta": {}}, Piece(""), finish, first=False))
        return entries

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
