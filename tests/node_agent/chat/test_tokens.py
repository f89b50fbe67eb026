"""The text of an answer over HTTP, and the tokens of its log-probabilities."""

from __future__ import annotations

import codecs
from typing import Any

import pytest

CHAT = [{"role": "user", "content": "hello"}]


# ---- the space before the first word ----


def test_the_first_word_keeps_its_space(llama: Any) -> None:
    options: dict[str, Any] = {"prompt": "hello", "max_tokens": 2, "logit_bias": llama.bias("▁two"), "logprobs": 0}
    one = llama.choice(**options)
    assert one["text"] == " two two"
    assert one["logprobs"]["tokens"] == [" two", " two"]
    assert one["logprobs"]["text_offset"] == [0, 4]
    assert llama.streamed_choices("completions", **options) == [one]
    by_ids = llama.choice(**options | {"prompt": llama.ids("hello")})
    assert by_ids == one
    echoed = llama.choice(**options, echo=True)
    assert echoed["text"] == "hello two two"
    assert llama.choice(**options | {"prompt": [1]})["text"] == "two two", "behind a begin token alone"


@pytest.mark.parametrize("stop", (" two", " t", "o two", [" tw", "x"]))
def test_a_stop_string_may_begin_with_that_space(llama: Any, stop: Any) -> None:
    options: dict[str, Any] = {"prompt": "hello", "max_tokens": 3, "logit_bias": llama.bias("▁two"), "logprobs": 1}
    text = " two two two"
    first = min(text.index(one) for one in ([stop] if isinstance(stop, str) else stop) if one in text)
    one = llama.choice(**options, stop=stop)
    assert (one["text"], one["finish_reason"]) == (text[:first], "stop")
    assert "".join(one["logprobs"]["tokens"]) in (text[:first], text[:4]), "tokens that begin in the text"
    assert llama.streamed_choices("completions", **options, stop=stop) == [one]


def test_a_chats_answer_goes_on_behind_its_prompt(llama: Any) -> None:
    options: dict[str, Any] = {"messages": CHAT, "max_tokens": 2, "logit_bias": llama.bias("▁two"), "logprobs": True}
    (one,) = llama.choices("chat/completions", **options)
    assert one["message"]["content"] == " two two"
    assert [bytes(entry["bytes"]) for entry in one["logprobs"]["content"]] == [b" two", b" two"]
    (streamed,) = llama.streamed_choices("chat/completions", **options)
    assert (streamed["text"], streamed["logprobs"]) == (" two two", one["logprobs"])


# ---- tokens in log-probabilities ----


def offsets_of(parts: list[bytes], each_byte: bool) -> list[int]:
    """Where tokens begin, counted in whole characters by Python's own decoder."""
    errors = "one_each" if each_byte else "replace"
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    found, chars = [], 0
    for part in parts:
        found.append(chars)
        chars += len(decoder.decode(part))
    return found


codecs.register_error("one_each", lambda e: ("\ufffd" * (e.end - e.start), e.end))  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", range(3))
def test_chat_tokens_are_the_bytes_of_the_text(server: Any, seed: int) -> None:
    options: dict[str, Any] = {"messages": CHAT, "max_tokens": 40, "temperature": 1.5, "seed": seed}
    options |= {"logprobs": True, "top_logprobs": 9, "return_token_ids": True}
    (one,) = server.choices("chat/completions", **options)
    content, text = one["logprobs"]["content"], one["message"]["content"]
    assert [bytes(entry["bytes"]) for entry in content] == [server.bytes_of(token) for token in one["token_ids"]]
    assert b"".join(map(server.part_of, one["token_ids"])).decode(errors="ignore") == text.replace("\ufffd", "")
    for entry in content:
        assert entry["token"] == bytes(entry["bytes"]).decode(errors="backslashreplace")
        assert len({best["token"] for best in entry["top_logprobs"]}) == len(entry["top_logprobs"]) == 9
    (streamed,) = server.streamed_choices("chat/completions", **options)
    assert (streamed["text"], streamed["logprobs"]) == (text, one["logprobs"])
    assert streamed["token_ids"] == one["token_ids"]


@pytest.mark.parametrize("echo", (False, True))
@pytest.mark.parametrize("seed", range(3))
def test_completion_tokens_have_their_place_in_the_text(server: Any, seed: int, echo: bool) -> None:
    prompt = [*server.ids("hello 😎 é"), server.reference.eos_token_id, *server.ids("two")]
    options: dict[str, Any] = {"prompt": prompt, "max_tokens": 40, "temperature": 1.5, "seed": seed, "echo": echo}
    options |= {"logprobs": 5, "return_token_ids": True}
    one = server.choice(**options)
    assert one["prompt_token_ids"] == prompt
    ids, scores = [*(prompt if echo else []), *one["token_ids"]], one["logprobs"]
    assert len(ids) == len(scores["tokens"])
    parts = [server.part_of(token) for token in ids]
    if echo and server.strips:
        first = next(n for n, part in enumerate(parts) if part)
        parts[first] = parts[first].removeprefix(b" ")
    assert scores["text_offset"] == offsets_of(parts, server.strips)
    for token, part, start in zip(scores["tokens"], parts, scores["text_offset"], strict=True):
        if part and not token.startswith("bytes:"):
            assert token == part.decode()
            assert one["text"][start:].lstrip("\ufffd").startswith(token)
        elif part:
            assert token == "bytes:" + part.decode(errors="backslashreplace")
    for token, value, best in zip(scores["tokens"], scores["token_logprobs"], scores["top_logprobs"], strict=True):
        if best is not None:
            assert best[token] == value
            assert len(best) in (5, 6), "the likeliest, and the chosen one where it is none of them"
    assert server.streamed_choices("completions", **options) == [one]


def test_a_prompt_that_begins_an_emoji_is_ended_by_the_answer(llama: Any) -> None:
    *prompt, last = llama.ids("hello 😎")
    options: dict[str, Any] = {"prompt": prompt, "max_tokens": 1, "logit_bias": {str(last): 100}, "logprobs": 0}
    one = llama.choice(**options)
    assert (one["text"], one["logprobs"]["tokens"]) == ("😎", ["bytes:\\x8e"])
    echoed = llama.choice(**options, echo=True)
    assert echoed["text"] == "hello 😎"
    assert echoed["logprobs"]["text_offset"][-5:] == [5, 6, 6, 6, 6]
    assert llama.streamed_choices("completions", **options, echo=True) == [echoed]


def test_tokens_with_the_same_text_are_told_apart(llama: Any) -> None:
    """The vocabulary has a letter twice, as itself and as a byte: neither hides the other."""
    byte, letter = (llama.reference.convert_tokens_to_ids(piece) for piece in ("<0x74>", "t"))
    assert llama.reference.decode([byte]) == llama.reference.decode([letter]) == "t"
    options: dict[str, Any] = {"prompt": "hello", "max_tokens": 1, "logprobs": 20, "temperature": 0}
    for token, other in ((byte, letter), (letter, byte)):
        for n in range(60):
            scores = llama.choice(**options | {"prompt": [1, 259 + n]}, logit_bias={str(token): 100})["logprobs"]
            (best,) = scores["top_logprobs"]
            assert scores["tokens"] == ["t"]
            assert len(best) in (20, 21)
            if f"token_id:{other}" in best:
                break
        else:
            pytest.fail("no prompt after which both are likely")


def test_tokens_may_go_by_their_ids(server: Any) -> None:
    options: dict[str, Any] = {"max_tokens": 5, "temperature": 1, "seed": 3, "return_token_ids": True}
    asked = {**options, "return_tokens_as_token_ids": True}
    plain = server.choice(prompt="hello", logprobs=2, echo=True, **options)
    one = server.choice(prompt="hello", logprobs=2, echo=True, **asked)
    assert one["logprobs"]["tokens"] == [f"token_id:{token}" for token in [*server.ids("hello"), *one["token_ids"]]]
    for name in ("text_offset", "token_logprobs"):
        assert one["logprobs"][name] == plain["logprobs"][name]
    assert all(key.startswith("token_id:") for best in one["logprobs"]["top_logprobs"][1:] for key in best), (
        "the likeliest ones, too"
    )
    (chat,) = server.choices("chat/completions", messages=CHAT, logprobs=True, top_logprobs=2, **asked)
    for token, entry in zip(chat["token_ids"], chat["logprobs"]["content"], strict=True):
        assert entry["token"] == f"token_id:{token}"
        assert bytes(entry["bytes"]) == server.bytes_of(token)


def test_ids_of_prompt_and_answer(server: Any) -> None:
    """As in vLLM: a completion's choices have both, a chat's answer has the prompt's, and so has its first chunk."""
    options: dict[str, Any] = {"max_tokens": 6, "temperature": 1, "seed": 1, "return_token_ids": True}
    prompt = server.reference.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    answer = server.post("chat/completions", messages=CHAT, **options)
    assert answer["prompt_token_ids"] == prompt
    (choice,) = answer["choices"]
    assert len(choice["token_ids"]) == answer["usage"]["completion_tokens"] == 6
    assert "prompt_token_ids" not in choice
    chunks = server.streamed("chat/completions", messages=CHAT, **options)
    assert [chunk.get("prompt_token_ids") for chunk in chunks] == [prompt] + [None] * (len(chunks) - 1)
    assert [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]] == choice["token_ids"]
    parts = server.streamed("completions", prompt="hello", **options)
    shown = [part["choices"][0].get("prompt_token_ids") for part in parts]
    assert shown == [server.ids("hello")] + [None] * (len(parts) - 1)
    plain = server.post("completions", prompt="hello", max_tokens=1)
    assert not {"token_ids", "prompt_token_ids", "prompt_logprobs"} & plain["choices"][0].keys()


def test_ids_hold_the_token_that_ended_the_answer(server: Any) -> None:
    end = server.reference.eos_token_id
    options: dict[str, Any] = {"max_tokens": 6, "logit_bias": {str(end): 100}, "ignore_eos": False}
    one = server.choice(prompt="hello", return_token_ids=True, **options)
    assert (one["text"], one["token_ids"], one["finish_reason"]) == ("", [end], "stop")
