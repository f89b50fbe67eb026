"""Prompts over HTTP: scored, several at once, with tokens that the model lacks; and stop strings of special tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

CHAT = [{"role": "user", "content": "hello"}]
SMALL_VOCABULARY = 330


# ---- scoring ----


@pytest.mark.parametrize("stream", (False, True))
@pytest.mark.parametrize("text", ("one two three", "hello 😎 é\n two", "  two", "two  "))
def test_a_text_is_scored_and_nothing_said(server: Any, text: str, stream: bool) -> None:
    """What evaluation harnesses ask for: max_tokens 0, echo and logprobs."""
    options: dict[str, Any] = {"prompt": text, "max_tokens": 0, "echo": True, "logprobs": 2, "temperature": 0}
    ask = server.streamed_choices if stream else server.choices
    (one,) = ask("completions", **options)
    ids, scores = server.ids(text), one["logprobs"]
    assert (one["text"], one["finish_reason"]) == (text, "length")
    logp = server.logp(ids)
    assert scores["token_logprobs"][0] is None
    expected = [float(logp[n, token]) for n, token in enumerate(ids[1:])]
    assert scores["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)
    for n, (best, value) in enumerate(zip(scores["top_logprobs"][1:], expected, strict=True)):
        wanted = {*logp[n].topk(2).values.tolist(), value}
        assert sorted(best.values()) == pytest.approx(sorted(wanted), abs=1e-4)
    whole = server.post("completions", **options)
    assert whole["usage"]["completion_tokens"] == 0
    assert whole["usage"]["total_tokens"] == len(ids)
    by_ids = server.choice(**options | {"prompt": ids})["logprobs"]
    assert by_ids == scores, "offsets from the text are those from its tokens"


@pytest.mark.parametrize("top", (0, 1, 3))
def test_prompt_logprobs_are_the_models(server: Any, top: int) -> None:
    """vLLM's form: by id, with the rank in the vocabulary; the first token follows nothing."""
    ids = server.ids("one two 😎")
    one = server.choice(prompt="one two 😎", max_tokens=1, prompt_logprobs=top)
    assert one["prompt_logprobs"][0] is None
    logp = server.logp(ids)
    for n, (token, entries) in enumerate(zip(ids[1:], one["prompt_logprobs"][1:], strict=True)):
        best = logp[n].topk(max(top, 1))
        wanted = {token: float(logp[n, token])}
        if top:
            wanted |= dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        assert {int(name): entry["logprob"] for name, entry in entries.items()} == pytest.approx(wanted, abs=1e-4)
        assert entries[str(token)]["rank"] == int((logp[n] >= logp[n, token]).sum())
        if top:
            assert [entries[str(likely)]["rank"] for likely in best.indices.tolist()] == list(range(1, top + 1))
        for name, entry in entries.items():
            if n:
                assert entry["decoded_token"] == server.bytes_of(int(name)).decode(errors="backslashreplace")
    answer = server.post("chat/completions", messages=CHAT, max_tokens=1, prompt_logprobs=top)
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    both = server.choice(prompt="one two 😎", max_tokens=1, prompt_logprobs=top, echo=True, logprobs=2)
    assert both["prompt_logprobs"] == one["prompt_logprobs"]
    assert all(len(best) in (2, 3) for best in both["logprobs"]["top_logprobs"][1:])


# ---- stop strings of special tokens ----


@pytest.mark.parametrize("stream", (False, True))
@pytest.mark.parametrize("behind", ("", "x"))
def test_a_stop_string_that_is_a_special_token(server: Any, stream: bool, behind: str) -> None:
    """The token is left out of the text, and ends it."""
    special = server.reference.all_special_tokens[-1]
    ask = server.streamed_choices if stream else server.choices
    options: dict[str, Any] = {"prompt": "hello", "max_tokens": 5, "logit_bias": server.bias(special)}
    (one,) = ask("completions", **options, stop=[special + behind, "never"], return_token_ids=True)
    if behind:
        assert (one["text"], one["finish_reason"], len(one["token_ids"])) == ("", "length", 5)
    else:
        assert (one["text"], one["finish_reason"], len(one["token_ids"])) == ("", "stop", 1)


# ---- several prompts ----


@pytest.mark.parametrize("stream", (False, True))
@pytest.mark.parametrize("kind", ("texts", "ids"))
def test_prompts_are_answered_each_as_if_alone(server: Any, kind: str, stream: bool) -> None:
    """Choices are numbered prompt by prompt."""
    prompts: list[Any] = ["one two", "hello", "three é"]
    if kind == "ids":
        prompts = [server.ids(prompt) for prompt in prompts]
    options: dict[str, Any] = {"max_tokens": 8, "temperature": 1, "seed": 5, "n": 2, "echo": True, "logprobs": 1}
    ask = server.streamed_choices if stream else server.choices
    several = ask("completions", prompt=prompts, **options)
    assert [choice["index"] for choice in several] == list(range(6))
    alone = [choice for prompt in prompts for choice in server.choices("completions", prompt=prompt, **options)]
    assert [choice | {"index": 0} for choice in several] == [choice | {"index": 0} for choice in alone]
    usage = server.post("completions", prompt=prompts, **options)["usage"]
    tokens = sum(len(prompt if kind == "ids" else server.ids(prompt)) for prompt in prompts)
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (tokens, 48)


def test_prompts_of_a_list_are_scored(server: Any) -> None:
    options: dict[str, Any] = {"max_tokens": 0, "echo": True, "logprobs": 1}
    several = server.choices("completions", prompt=["one two", "hello"], **options)
    assert [choice["text"] for choice in several] == ["one two", "hello"]
    assert [choice["logprobs"] for choice in several] == [
        server.choice(prompt=prompt, **options)["logprobs"] for prompt in ("one two", "hello")
    ]


@pytest.mark.parametrize("prompt", (["hello"], [[5, 6]]))
def test_a_list_of_one_is_the_prompt_itself(server: Any, prompt: list[Any]) -> None:
    options: dict[str, Any] = {"max_tokens": 8, "temperature": 0}
    assert server.choice(prompt=prompt, **options) == server.choice(prompt=prompt[0], **options)


# ---- a tokenizer that knows more than the model ----


def test_tokens_that_the_model_lacks_are_refused_when_they_come(
    open_server: Callable[[Path], Any], sentencepiece: Path, tmp_path: Path
) -> None:
    shutil.copytree(sentencepiece, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": SMALL_VOCABULARY}))
    weights = load_file(tmp_path / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        weights[name] = weights[name][:SMALL_VOCABULARY].clone()
    save_file(weights, tmp_path / "model.safetensors")
    with open_server(tmp_path) as small:
        (lacking,) = small.ids("two")[1:]
        assert lacking >= SMALL_VOCABULARY
        assert small.choice(prompt="o", max_tokens=20, temperature=2, logprobs=20)["text"]
        chat = {"messages": [{"role": "user", "content": "two"}]}
        for path, body, field in (
            ("completions", {"prompt": "two"}, "prompt"),
            ("completions", {"prompt": "two", "echo": True, "max_tokens": 0}, "prompt"),
            ("completions", {"prompt": [1, lacking]}, "prompt"),
            ("completions", {"prompt": ["o", "two"]}, "prompt"),
            ("chat/completions", chat, "messages"),
        ):
            answer = small.http.post(f"/v1/{path}", json={"model": "base", **body})
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, field), error
            assert f"has 0 to {SMALL_VOCABULARY - 1}" in error["message"], error
            assert f"token {lacking}," in error["message"] or path != "completions", error
