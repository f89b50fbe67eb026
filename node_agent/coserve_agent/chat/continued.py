"""A prompt that ends in the middle of the assistant's message, which the answer goes on with: transformers'
`continue_final_message`.
"""

from __future__ import annotations

from coserve_agent.chat.format import plain
from coserve_agent.chat.template import ChatTemplateError, Message


def check_continued(message: Message) -> None:
    """Raises ChatTemplateError for a message that nothing can go on with."""
    if message["role"] != "assistant" or not plain(message).strip() or message.get("tool_calls"):
        raise ChatTemplateError(
            "continue_final_message is true, and the last message is none of the assistant's with content and without "
            "tool_calls; add one, or leave the field out"
        )


def cut_behind(text: str, message: Message) -> str:
    """`text`, a conversation that ends with `message`, up to the end of its content. (Some templates strip it.)

    Raises:
        ChatTemplateError: the template does not write it as it is.
    """
    content = plain(message)
    at = text.rfind(content.strip())
    if at < 0:
        raise ChatTemplateError(
            "continue_final_message is true, and the chat template does not write the last message as it is, so that "
            "no answer can go on with it; leave the field out"
        )
    whole = content.lstrip()
    return text[: at + len(whole if text.startswith(whole, at) else content.strip())]
