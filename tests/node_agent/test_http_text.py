"""Text and tokens over HTTP with tokenizers of both kinds: one that writes bytes, and one like Llama 2's, whose decoder
strips a text's first space and which spells in bytes what it has no token for.
"""

from __future__ import annotations

import codecs
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

LETTERS = {letter: byte for byte, letter in bytes_to_unicode().items()}
CHAT = [{"role": "user", "content": "hello"}]
SMALL_VOCABULARY = 330


class Server:
    """An agent on a model folder, and transformers' idea of the same folder."""

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


@pytest.fixture(scope="module")
def llama(start_agent: Callable[..., Any], sentencepiece: Path) -> Iterator[Server]:
    with Server(start_agent(model_path=sentencepiece).url, sentencepiece) as server:
        yield server


@pytest.fixture(scope="module")
def bytelevel(served: Any, model_folder: Path) -> Iterator[Server]:
    with Server(served.url, model_folder) as server:
        yield server


@pytest.fixture(params=("llama", "bytelevel"))
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    yield request.getfixturevalue(request.param)


# ---- the space before the first word ----


def test_the_first_word_keeps_its_space(llama: Server) -> None:
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
def test_a_stop_string_may_begin_with_that_space(llama: Server, stop: Any) -> None:
    options: dict[str, Any] = {"prompt": "hello", "max_tokens": 3, "logit_bias": llama.bias("▁two"), "logprobs": 1}
    text = " two two two"
    first = min(text.index(one) for one in ([stop] if isinstance(stop, str) else stop) if one in text)
    one = llama.choice(**options, stop=stop)
    assert (one["text"], one["finish_reason"]) == (text[:first], "stop")
    assert "".join(one["logprobs"]["tokens"]) in (text[:first], text[:4]), "tokens that begin in the text"
    assert llama.streamed_choices("completions", **options, stop=stop) == [one]


def test_a_chats_answer_goes_on_behind_its_prompt(llama: Server) -> None:
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
def test_chat_tokens_are_the_bytes_of_the_text(server: Server, seed: int) -> None:
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
def test_completion_tokens_have_their_place_in_the_text(server: Server, seed: int, echo: bool) -> None:
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


def test_a_prompt_that_begins_an_emoji_is_ended_by_the_answer(llama: Server) -> None:
    *prompt, last = llama.ids("hello 😎")
    options: dict[str, Any] = {"prompt": prompt, "max_tokens": 1, "logit_bias": {str(last): 100}, "logprobs": 0}
    one = llama.choice(**options)
    assert (one["text"], one["logprobs"]["tokens"]) == ("😎", ["bytes:\\x8e"])
    echoed = llama.choice(**options, echo=True)
    assert echoed["text"] == "hello 😎"
    assert echoed["logprobs"]["text_offset"][-5:] == [5, 6, 6, 6, 6]
    assert llama.streamed_choices("completions", **options, echo=True) == [echoed]


def test_tokens_with_the_same_text_are_told_apart(llama: Server) -> None:
    """`two` has a token of letters and begins with one of bytes; both are likely, and neither hides the other."""
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


def test_tokens_may_go_by_their_ids(server: Server) -> None:
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


def test_ids_of_prompt_and_answer(server: Server) -> None:
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


def test_ids_hold_the_token_that_ended_the_answer(server: Server) -> None:
    end = server.reference.eos_token_id
    options: dict[str, Any] = {"max_tokens": 6, "logit_bias": {str(end): 100}, "ignore_eos": False}
    one = server.choice(prompt="hello", return_token_ids=True, **options)
    assert (one["text"], one["token_ids"], one["finish_reason"]) == ("", [end], "stop")


# ---- scoring ----


@pytest.mark.parametrize("stream", (False, True))
@pytest.mark.parametrize("text", ("one two three", "hello 😎 é\n two", "  two", "two  "))
def test_a_text_is_scored_and_nothing_said(server: Server, text: str, stream: bool) -> None:
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
def test_prompt_logprobs_are_the_models(server: Server, top: int) -> None:
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
def test_a_stop_string_that_is_a_special_token(server: Server, stream: bool, behind: str) -> None:
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
def test_prompts_are_answered_each_as_if_alone(server: Server, kind: str, stream: bool) -> None:
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


def test_prompts_of_a_list_are_scored(server: Server) -> None:
    options: dict[str, Any] = {"max_tokens": 0, "echo": True, "logprobs": 1}
    several = server.choices("completions", prompt=["one two", "hello"], **options)
    assert [choice["text"] for choice in several] == ["one two", "hello"]
    assert [choice["logprobs"] for choice in several] == [
        server.choice(prompt=prompt, **options)["logprobs"] for prompt in ("one two", "hello")
    ]


@pytest.mark.parametrize("prompt", (["hello"], [[5, 6]]))
def test_a_list_of_one_is_the_prompt_itself(server: Server, prompt: list[Any]) -> None:
    options: dict[str, Any] = {"max_tokens": 8, "temperature": 0}
    assert server.choice(prompt=prompt, **options) == server.choice(prompt=prompt[0], **options)


# ---- a tokenizer that knows more than the model ----


def test_tokens_that_the_model_lacks_are_refused_when_they_come(
    start_agent: Callable[..., Any], sentencepiece: Path, tmp_path: Path
) -> None:
    shutil.copytree(sentencepiece, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": SMALL_VOCABULARY}))
    weights = load_file(tmp_path / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        weights[name] = weights[name][:SMALL_VOCABULARY].clone()
    save_file(weights, tmp_path / "model.safetensors")
    with Server(start_agent(model_path=tmp_path).url, tmp_path) as small:
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
