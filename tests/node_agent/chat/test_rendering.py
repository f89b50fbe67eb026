"""What is learned is what is served: for every chat template of TRL's, three kinds of tokenizers and conversations of
any text, each learned span stands behind exactly the ids that a request would have, and is the answer and its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from chat_templates import KINDS, all_templates, write_folder
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from coserve_agent.chat.end_tokens import end_tokens
from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.data.rendering import Conversation, Rendered, Renderer, RenderingError

NAMES = sorted(all_templates())
texts = st.text("aby \n<>/.é", min_size=1, max_size=6).filter(str.strip)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    system = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    turns = draw(st.lists(st.tuples(texts, texts), min_size=1, max_size=3))
    said = [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn)]  # noqa: B905
    return system + said


class Model:
    """A template with a tokenizer: ours, and transformers' of the same folder."""

    def __init__(self, name: str, kind: str) -> None:
        self.folder = Path(mkdtemp()) / name
        write_folder(self.folder, all_templates()[name], kind)
        self.tokenizer = Tokenizer(self.folder)
        self.ends = end_tokens(self.folder, self.tokenizer)
        self.renderer = Renderer(self.tokenizer, self.ends)
        self.reference: Any = PreTrainedTokenizerFast.from_pretrained(str(self.folder))
        self._in_parts = self.tokenizer._in_parts | self.tokenizer._in_one_part

    def asked(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """The ids of the request that `messages` would be, by transformers."""
        shaped = [
            {**one, "content": [{"type": "text", "text": one["content"]}]} if one["role"] in self._in_parts else one
            for one in messages
        ]
        text = self.reference.apply_chat_template(shaped, tokenize=False, add_generation_prompt=True)
        ids: list[int] = self.reference(text, add_special_tokens=False)["input_ids"]
        return ids

    def said(self, tokens: Sequence[int]) -> str:
        """Their bytes behind others."""
        return b"".join(map(self.tokenizer.pieces.bytes_of, tokens)).decode(errors="replace")


@cache
def model(name: str, kind: str) -> Model:
    return Model(name, kind)


def spans(sequence: Rendered) -> list[tuple[int, int]]:
    flags = [False, *sequence.learned, False]
    edges = [n for n in range(len(flags) - 1) if flags[n] != flags[n + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def check(one: Model, messages: list[dict[str, Any]], sequences: Sequence[Rendered]) -> None:
    """That these are `messages` as they are served."""
    answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    found = [(sequence, first, last) for sequence in sequences for first, last in spans(sequence)]
    assert len(found) == len(answers)
    for index, (sequence, first, last) in zip(answers, found, strict=True):
        assert sequence.tokens[:first] == one.asked(messages[:index])
        answer = sequence.tokens[first:last]
        assert answer[-1] in one.ends
        while answer[-1] in one.tokenizer.pieces.special:  # some end a turn with two
            answer.pop()
        text = one.said(answer)
        # Where the prompt opens a think block, the answer closes it; some templates strip what was said.
        text = text.partition("</think>")[2] if text.lstrip().startswith("</think>") else text
        assert text.strip() == messages[index]["content"].strip()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_learned_is_what_is_served(name: str, kind: str) -> None:
    one = model(name, kind)
    seen = []

    @settings(max_examples=15, suppress_health_check=list(HealthCheck), database=None)
    @given(conversations())
    def holds(messages: list[dict[str, Any]]) -> None:
        try:
            one.asked(messages[:-1])
        except Exception:
            with pytest.raises(RenderingError):
                one.renderer.chat(Conversation(messages))
            assume(False)
        seen.append(messages)
        check(one, messages, one.renderer.chat(Conversation(messages)))

    holds()
    assert seen


def by_offsets(one: Model, messages: list[dict[str, Any]]) -> list[Rendered]:
    """How it was done: spans of the text, looked up among the offsets of its tokens."""
    render = one.tokenizer.render
    text = render(messages, add_generation_prompt=False)
    wanted = []
    for n, message in enumerate(messages):
        if message["role"] == "assistant":
            before = render(messages[:n], add_generation_prompt=True)
            wanted.append((len(before), len(render(messages[: n + 1], add_generation_prompt=False))))
    encoding = one.tokenizer._backend.encode(text, add_special_tokens=False)
    flags = [any(start <= first and last <= end for start, end in wanted) for first, last in encoding.offsets]
    return [Rendered(0, list(encoding.ids), flags)]


@pytest.mark.parametrize(("name", "answer"), [("qwen3", "yes"), ("qwen2_5", "\nno"), ("deepseek_r1_distill", "yes")])
def test_offsets_in_a_text_do_not_give_that(name: str, answer: str) -> None:
    """The control."""
    one = model(name, "bytes")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
    check(one, messages, one.renderer.chat(Conversation(messages)))
    with pytest.raises(AssertionError):
        check(one, messages, by_offsets(one, messages))
