"""A prompt may end in the assistant's message, as in transformers, for every template that writes it as it is."""

from __future__ import annotations

from typing import Any

import pytest
from call_templates import tokenizer
from chat_templates import trl_templates
from transformers import PreTrainedTokenizerFast

from coserve_agent.chat.template import ChatTemplateError

USER = {"role": "user", "content": "hi"}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


@pytest.mark.parametrize("content", ["Sure, it", " it\n", "hi"])
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "gemma", "phi3"])
def test_it_ends_where_transformers_ends_it(name: str, content: str) -> None:
    of = tokenizer(name)
    reference: Any = PreTrainedTokenizerFast(tokenizer_object=of._backend, bos_token="<begin>", eos_token="<eos>")
    reference.chat_template = trl_templates()[name]
    messages = [USER, assistant(content)]
    text = reference.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert of.decode(of.encode_chat(messages, continues=True), False) == text
    assert text.endswith(content.strip()) or text.endswith(content)


def test_parts_are_continued_as_one_text() -> None:
    parts = assistant([{"type": "text", "text": "Sure,"}, {"type": "text", "text": "it"}])
    joined = assistant("Sure,\nit")
    of = tokenizer("qwen2_5")
    assert of.encode_chat([USER, parts], continues=True) == of.encode_chat([USER, joined], continues=True)


def test_a_prompt_that_asks_for_nothing_ends_with_its_last_message() -> None:
    of = tokenizer("qwen2_5")
    asked, plain = of.encode_chat([USER]), of.encode_chat([USER], asks=False)
    assert asked[: len(plain)] == plain
    assert of.decode(asked[len(plain) :], False) == "<|im_start|>assistant\n"


@pytest.mark.parametrize("last", [USER, assistant(" "), assistant("", tool_calls=[{}])])
def test_what_nothing_can_go_on_with_is_refused(last: dict[str, Any]) -> None:
    with pytest.raises(ChatTemplateError, match="continue_final_message is true"):
        tokenizer("qwen2_5").encode_chat([USER, last], continues=True)
