"""From a checked chat to its prompt: what every API does whose requests are conversations."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from coserve_agent.chat.message import MessageError
from coserve_agent.chat.template import ChatTemplateError, Given
from coserve_agent.chat.variables import TemplateVariableError, check_variables, together, try_variables
from coserve_agent.generation.generator import Generator
from coserve_agent.http.body import read_json
from coserve_agent.http.errors import bad_request
from coserve_agent.requests.chat import ChatRequest
from coserve_agent.requests.prompts import Prompt, check_ids
from coserve_agent.requests.reading import check_offer, reading_of
from coserve_agent.tools.answer_format import AnswerFormat

VARIABLES = "chat_template_kwargs"


@dataclass(frozen=True)
class Serving:
    """What routes need: `answers` is how the model writes calls and thoughts."""

    generator: Generator
    answers: AnswerFormat
    max_body_bytes: int

    async def body(self, request: Request) -> dict[str, Any]:
        """That of a request for an answer; without a model's name it is for the base model, as in vLLM.

        Raises:
            ApiError: 503 while loading, and as `read_json`.
        """
        self.generator.check_open()
        body = await read_json(request, self.max_body_bytes)
        if body.get("model") in (None, ""):
            body["model"] = self.generator.models.listing()[0].name
        return body

    async def prompt(self, parsed: ChatRequest) -> Prompt:
        """The tokens of a conversation, and how the answer to it is read.

        Raises:
            ApiError: 400 naming the field that is wrong, 404 for the model.
        """
        generator, tokenizer = self.generator, self.generator.tokenizer
        served = generator.served(parsed.model)
        generator.check_choices(1, parsed)
        check_offer(parsed, self.answers)
        given = parsed.chat_template_kwargs or {}
        with blaming_variables():
            check_variables(tokenizer, given, VARIABLES)
        offered = Given([tool.shown() for tool in parsed.tools or ()], together(tokenizer, served.variables, given))
        try:
            messages = [message.plain(tokenizer.written_fields) for message in parsed.messages]
            # A template is a program of whoever made the model's folder: nobody else waits for it.
            prompt = await asyncio.to_thread(
                tokenizer.encode_chat,
                messages,
                offered,
                asks=parsed.add_generation_prompt is not False,
                continues=bool(parsed.continue_final_message),
            )
        except MessageError as error:
            code = "unsupported_parameter" if error.unsupported else "invalid_value"
            raise bad_request(str(error), "messages", code) from None
        except ChatTemplateError as error:
            with blaming_variables():
                await asyncio.to_thread(try_variables, tokenizer, given, VARIABLES, messages)
            raise bad_request(f"messages: {error}", "messages", "invalid_value") from None
        check_ids(prompt, generator.vocab_size, "messages")
        limit = parsed.max_tokens if parsed.max_completion_tokens is None else parsed.max_completion_tokens
        reading, structure = reading_of(parsed, self.answers, tokenizer, prompt)
        return Prompt(prompt, limit, reading=reading, structure=structure)


@contextmanager
def blaming_variables() -> Iterator[None]:
    """Raises ApiError 400 for variables that cannot be set."""
    try:
        yield
    except TemplateVariableError as error:
        raise bad_request(str(error), VARIABLES, "invalid_value") from None
