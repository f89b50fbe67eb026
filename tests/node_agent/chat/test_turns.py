"""Right values, family by family: what is learned of a row, and what it is learned behind."""

from __future__ import annotations

from datetime import date
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from chat_templates import all_templates, write_folder

from coserve_agent.chat.end_tokens import end_tokens
from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.data.rendering import Conversation, Rendered, Renderer, RenderingError

USER, YES = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok"}
AGAIN, NO = {"role": "user", "content": "so"}, {"role": "assistant", "content": "ko"}
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "look", "arguments": {"at": "me"}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
FOUND = {"role": "tool", "name": "look", "tool_call_id": "abcdefghi", "content": "42"}
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "d",
        "parameters": {"type": "object", "properties": {"at": {"type": "string", "description": "x"}}},
    },
}


@cache
def folder(name: str) -> Path:
    path = Path(mkdtemp()) / name
    write_folder(path, all_templates()[name], "bytes")
    return path


@cache
def tokenizer(name: str) -> Tokenizer:
    return Tokenizer(folder(name))


def rendered(name: str, *messages: dict[str, Any], **options: Any) -> list[Rendered]:
    conversation = Conversation(messages, options.pop("tools", ()), options.pop("learned", None))
    return Renderer(tokenizer(name), end_tokens(folder(name), tokenizer(name)), **options).chat(conversation)


def shown(name: str, sequence: Rendered) -> str:
    """The sequence, what is learned of it in «»."""
    text, before = "", False
    for token, learned in zip([*sequence.tokens, None], [*sequence.learned, False], strict=True):
        text += "«" * (learned and not before) + "»" * (before and not learned)
        text += "" if token is None else tokenizer(name).pieces.bytes_of(token).decode(errors="replace")
        before = learned
    return text


def texts(name: str, *messages: dict[str, Any], **options: Any) -> list[str]:
    return [shown(name, one) for one in rendered(name, *messages, **options)]


def test_a_think_block_that_nobody_said_is_not_learned() -> None:
    """Qwen3's history has none, so one sequence serves both turns."""
    assert texts("qwen3", USER, YES, AGAIN, NO) == [
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n«ok<|im_end|>»\n"
        "<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\n«ko<|im_end|>»"
    ]
    thought = {**YES, "reasoning_content": "hm"}
    assert texts("qwen3", USER, thought) == [
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n«<think>\nhm\n</think>\n\nok<|im_end|>»"
    ]
    assert texts("qwen3", USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nok"}) == texts(
        "qwen3", USER, thought
    )
    assert texts("qwen3", USER, YES, variables={"enable_thinking": False}) == [
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n«ok<|im_end|>»"
    ]


def test_thoughts_of_earlier_turns_are_learned_in_sequences_of_their_own() -> None:
    first, second = texts("qwen3", USER, {**YES, "reasoning_content": "hm"}, AGAIN, {**NO, "reasoning_content": "ah"})
    assert first.endswith("«<think>\nhm\n</think>\n\nok<|im_end|>»")
    assert second.endswith(
        "assistant\nok<|im_end|>\n<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\n"
        "«<think>\nah\n</think>\n\nko<|im_end|>»"
    )


@pytest.mark.parametrize(
    "said", [{**YES, "reasoning_content": "hm"}, {**YES, "content": "<think>\nhm\n</think>\n\nok"}]
)
def test_an_open_think_block_is_filled(said: dict[str, Any]) -> None:
    assert texts("deepseek_r1_distill", USER, said) == [
        "<begin><｜User｜>hi<｜Assistant｜><think>\n«hm\n</think>\n\nok<｜end▁of▁sentence｜>»"
    ]


def test_or_closed() -> None:
    assert texts("deepseek_r1_distill", USER, YES, AGAIN, NO) == [
        "<begin><｜User｜>hi<｜Assistant｜><think>\n«\n</think>\n\nok<｜end▁of▁sentence｜>»",
        "<begin><｜User｜>hi<｜Assistant｜>ok<｜end▁of▁sentence｜><｜User｜>so<｜Assistant｜><think>\n"
        "«\n</think>\n\nko<｜end▁of▁sentence｜>»",
    ]


def test_a_system_message_that_moves_to_the_last_user_message() -> None:
    system = {"role": "system", "content": "be"}
    assert texts("mistral", system, USER, YES, AGAIN, NO) == [
        "<begin>[INST] be\n\nhi[/INST]«ok<eos>»",
        "<begin>[INST] hi[/INST] ok<eos>[INST] be\n\nso[/INST]«ko<eos>»",
    ]


def test_a_channel_is_not_learned_where_the_answer_is_all_that_was_said() -> None:
    (text,) = texts("gptoss", USER, YES)
    assert text.endswith("<|start|>assistant«ok<|return|>»")


def test_calls_are_learned_as_the_template_writes_them() -> None:
    (text,) = texts("qwen2_5", USER, CALLS, FOUND, YES, tools=[TOOL])
    assert '"name": "look", "description": "d"' in text
    assert (
        '<|im_start|>assistant\n«<tool_call>\n{"name": "look", "arguments": {"at": "me"}}\n</tool_call><|im_end|>»\n'
        "<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n<|im_start|>assistant\n«ok<|im_end|>»"
    ) in text
    qwen3 = texts("qwen3", USER, CALLS, FOUND, YES, tools=[TOOL])
    assert "«" in qwen3[-1] and qwen3[-1].endswith("«ok<|im_end|>»")
    (as_text,) = texts("deepseekv3", USER, CALLS)
    assert '{"at": "me"}' in as_text and "«" in as_text


def test_a_part_that_leaves_no_trace_is_refused() -> None:
    with pytest.raises(RenderingError, match=r"messages\[1\].*reasoning_content; change"):
        rendered("qwen2_5", USER, {**YES, "reasoning_content": "hm"})
    with pytest.raises(RenderingError, match=r"messages\[1\].*tool_calls; change"):
        rendered("llama3", USER, CALLS)


def test_neither_is_content_lost_beside_calls() -> None:
    both = {**CALLS, "content": "let me see"}
    (text,) = texts("qwen2_5", USER, both, tools=[TOOL])
    assert "«let me see\n<tool_call>" in text
    with pytest.raises(RenderingError, match=r"messages\[1\].*content beside tool_calls; change"):
        rendered("llama3_1", USER, both, tools=[TOOL])


def test_the_first_message_is_not_learned_where_it_is_the_assistants() -> None:
    """Nobody asks for it: the default system prompt and the role's header would be its own."""
    (text,) = texts("qwen2_5", YES, USER, NO)
    assert text.count("«") == 1 and text.endswith("<|im_start|>assistant\n«ko<|im_end|>»")
    with pytest.raises(RenderingError, match=r"only messages\[0\] is the assistant's"):
        rendered("qwen2_5", YES, USER)


def test_what_is_not_to_be_learned_is_context() -> None:
    (text,) = texts("qwen2_5", USER, YES, AGAIN, NO, learned=frozenset({3}))
    assert text.count("«") == 1 and "ok<|im_end|>" in text and text.endswith("«ko<|im_end|>»")
    with pytest.raises(RenderingError, match="weight"):
        rendered("qwen2_5", USER, YES, learned=frozenset())


def test_a_template_without_an_end_gets_one() -> None:
    (first, second) = texts("endless", USER, YES, AGAIN, NO)
    assert first == "### user:\nhi\n\n### assistant:\n«ok<eos>»"
    assert second.endswith("### assistant:\nok\n\n### user:\nso\n\n### assistant:\n«ko<eos>»")


def test_without_any_end_nothing_is_taught() -> None:
    with pytest.raises(RenderingError, match=r"no eos_token.*set eos_token in tokenizer_config.json"):
        Renderer(tokenizer("endless"), ()).chat(Conversation((USER, YES)))


def test_a_template_that_asks_for_the_date_gets_the_jobs() -> None:
    (one,) = texts("llama3_2", USER, YES, today=date(2026, 7, 26))
    assert "Today Date: 26 Jul 2026" in one and one.endswith("«ok<|eot_id|>»")

    def digest(name: str, day: date) -> str:
        return Renderer(tokenizer(name), (2,), today=day).digest

    assert digest("llama3_2", date(2026, 7, 26)) != digest("llama3_2", date(2026, 7, 27))
    assert digest("qwen3", date(2026, 7, 26)) == digest("qwen3", date(2026, 7, 27)), "it does not ask"


def test_a_long_conversation_takes_as_long_as_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is tokenised a few times, however many turns stand before it."""
    tokenised: list[int] = []
    one = Tokenizer(folder("qwen2_5"))
    encode = one._backend.encode

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(backend, name)

        def encode(self, text: str, **options: Any) -> Any:
            tokenised.append(len(text))
            return encode(text, **options)

        def encode_batch(self, batch: list[str], **options: Any) -> Any:
            tokenised.extend(map(len, batch))
            return backend.encode_batch(batch, **options)

    backend = one._backend
    monkeypatch.setattr(one, "_backend", Counting())
    renderer = Renderer(one, end_tokens(folder("qwen2_5"), one))
    work = []
    for turns in (50, 100):
        tokenised.clear()
        (sequence,) = renderer.chat(Conversation([USER, {**YES, "content": "ok " * 40}] * turns))
        assert len(sequence.tokens) > 50 * turns
        work.append(sum(tokenised))
    assert work[1] < 2.5 * work[0]


# ---- prompts and completions ----


@cache
def sentences(kind: str) -> Renderer:
    path = Path(mkdtemp())
    write_folder(path, "{{ messages[0].content }}", kind)
    found = Tokenizer(path)
    return Renderer(found, end_tokens(path, found))


@pytest.mark.parametrize("kind", ["prepending", "metaspace"])
def test_a_completion_has_no_space_that_nobody_wrote(kind: str) -> None:
    renderer = sentences(kind)
    one = renderer.completion("2+2=", "4")
    pieces = renderer.tokenizer.pieces
    learned = [token for token, flag in zip(one.tokens, one.learned, strict=True) if flag]
    assert [pieces.bytes_of(token) for token in learned] == [b"4", b"<eos>"]


def test_joint_tokens_are_taken_where_the_prompts_begin_them() -> None:
    renderer = sentences("bytes")
    backend = renderer.tokenizer._backend
    one = renderer.completion("ab\n", "yes")
    prompt = backend.encode("ab\n").ids
    assert backend.encode("ab\nyes").ids[: len(prompt)] != prompt, "the newline and the y are one piece"
    assert one.tokens == [*prompt, *backend.encode("yes").ids, *renderer.ends[:1]]
    assert renderer.completion("ab", "yes").tokens[:-1] == backend.encode("abyes").ids


def test_begin_and_end_stand_once(sentencepiece_tokenizer: Tokenizer) -> None:
    begin, end = sentencepiece_tokenizer.encode("<s>")[0], 2
    renderer = Renderer(sentencepiece_tokenizer, (end,))
    for prompt in ("one", "<s>one", "<s> one"):
        for completion in (" two", " two</s>"):
            tokens = renderer.completion(prompt, completion).tokens
            assert tokens[0] == begin and tokens.count(begin) == 1
            assert tokens[-1] == end and tokens.count(end) == 1
    assert renderer.text("<s>one</s>").tokens == renderer.text("one").tokens
