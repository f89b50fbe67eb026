"""What clients ask of the sampler beyond temperature: parameters, log-probabilities, echo, choices, cached tokens."""

from __future__ import annotations

import re
import time
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import LlamaForCausalLM

from coserve_agent.generation.generator import Generator

CHAT = [{"role": "user", "content": "the quick brown fox"}]
GREEDY: dict[str, Any] = {"model": "base", "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def tokenizer(served: Any) -> Any:
    return served.agent.tokenizer


@pytest.fixture(scope="module")
def log_softmax(model_folder: Any) -> Any:
    """transformers' log-probabilities [tokens, vocab]."""
    model = LlamaForCausalLM.from_pretrained(model_folder)

    def of(tokens: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return torch.log_softmax(model(torch.tensor([tokens])).logits[0], -1)

    return of


# ---- parameters ----


def test_a_bias_decides_in_both_apis(client: openai.OpenAI, tokenizer: Any) -> None:
    (token,) = tokenizer.encode("q")
    options = {**GREEDY, "max_tokens": 4, "logit_bias": {str(token): 100}}
    assert client.chat.completions.create(messages=CHAT, **options).choices[0].message.content == "qqqq"
    assert client.completions.create(prompt="one", **options).choices[0].text == "qqqq"
    streamed = client.completions.create(prompt="one", stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in streamed) == "qqqq"


@pytest.mark.parametrize(
    "change", [{"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"repetition_penalty": 50.0}], ids=str
)
def test_penalties_change_what_repeats(client: openai.OpenAI, tokenizer: Any, change: dict[str, float]) -> None:
    options = {**GREEDY, "prompt": "one two three", "max_tokens": 80}
    plain = client.completions.create(**options).choices[0].text
    body = {**options["extra_body"], **change}
    assert client.completions.create(**{**options, "extra_body": body}).choices[0].text != plain


@pytest.mark.parametrize("change", [{"top_k": 1}, {"min_p": 1.0}], ids=str)
def test_a_cut_to_one_token_is_greedy(client: openai.OpenAI, change: dict[str, Any]) -> None:
    options = {**GREEDY, "prompt": "one two", "max_tokens": 30}
    greedy = client.completions.create(**options).choices[0].text
    body = {"ignore_eos": True, **change}
    assert client.completions.create(**{**options, "temperature": 2, "extra_body": body}).choices[0].text == greedy
    free = client.completions.create(**{**options, "temperature": 2}).choices[0].text
    assert free != greedy


def test_nothing_ends_before_min_tokens(client: openai.OpenAI) -> None:
    """Token 3 is this model's end."""
    options = {"model": "base", "prompt": "one", "max_tokens": 9, "logit_bias": {"3": 100}}
    assert client.completions.create(**options).usage.completion_tokens == 1
    answer = client.completions.create(**options, extra_body={"min_tokens": 5})
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (6, "stop")


@pytest.mark.parametrize("stream", (False, True))
def test_no_stop_string_does_either(client: openai.OpenAI, tokenizer: Any, stream: bool) -> None:
    (token,) = tokenizer.encode("q")
    options = {"model": "base", "prompt": "one", "max_tokens": 9, "logit_bias": {str(token): 100}, "stop": "q"}

    def text(**body: Any) -> str:
        answer = client.completions.create(**options, stream=stream, extra_body={"ignore_eos": True, **body})
        chunks = list(answer) if stream else [answer]
        assert chunks[-1].choices[0].finish_reason == "stop"
        return "".join(chunk.choices[0].text for chunk in chunks)

    assert text() == ""
    assert text(min_tokens=5) == "qqqqq"


def test_a_stop_token_ends_and_is_not_shown(client: openai.OpenAI, tokenizer: Any) -> None:
    (token,) = tokenizer.encode("q")
    body = {"ignore_eos": True, "stop_token_ids": [token]}
    answer = client.completions.create(
        model="base", prompt="one", max_tokens=5, logit_bias={str(token): 100}, extra_body=body, logprobs=1
    )
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "stop")
    assert answer.choices[0].logprobs.tokens == []


# ---- log-probabilities ----


def test_chat_logprobs_are_the_models(client: openai.OpenAI, tokenizer: Any, log_softmax: Any) -> None:
    answer = client.chat.completions.create(
        model="base",
        messages=CHAT,
        max_tokens=6,
        temperature=0.7,
        seed=4,
        logprobs=True,
        top_logprobs=3,
        extra_body={"ignore_eos": True},
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 6
    prompt, output = tokenizer.encode_chat(CHAT), []
    for entry in content:
        logp = log_softmax([*prompt, *output])[-1]
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(logp.topk(3).values.tolist(), abs=1e-4)
        best = [tokenizer.pieces.bytes_of(token) for token in logp.topk(3).indices.tolist()]
        assert [bytes(top.bytes) for top in entry.top_logprobs] == best
        near = ((logp - entry.logprob).abs() < 1e-4).nonzero().flatten().tolist()
        token = next(token for token in near if tokenizer.pieces.bytes_of(token) == bytes(entry.bytes))
        assert bytes(entry.bytes).decode(errors="backslashreplace") == entry.token
        output.append(token)


@pytest.mark.parametrize("top", (None, 0, 2))
def test_streamed_logprobs_are_those_of_the_whole(client: openai.OpenAI, top: int | None) -> None:
    options: dict[str, Any] = {
        "model": "base",
        "messages": CHAT,
        "max_tokens": 25,
        "temperature": 1,
        "seed": 8,
        "logprobs": True,
        "extra_body": {"ignore_eos": True},
    }
    if top is not None:
        options["top_logprobs"] = top
    whole = client.chat.completions.create(**options).choices[0].logprobs.content
    chunks = client.chat.completions.create(**options, stream=True)
    parts = [entry for c in chunks if c.choices[0].logprobs for entry in c.choices[0].logprobs.content]
    assert [p.model_dump() for p in parts] == [w.model_dump() for w in whole]
    assert {len(entry.top_logprobs) for entry in whole} == {top or 0}
    assert len(whole) == 25


def test_completion_logprobs_and_offsets(client: openai.OpenAI) -> None:
    options = {**GREEDY, "prompt": "one two three", "max_tokens": 12, "logprobs": 2}
    choice = client.completions.create(**options).choices[0]
    scores = choice.logprobs
    assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.top_logprobs) == 12
    for token, value, best in zip(scores.tokens, scores.token_logprobs, scores.top_logprobs, strict=True):
        assert best[token] == value == max(best.values()), "greedy: the chosen token is the likeliest"
    chunks = list(client.completions.create(**options, stream=True))
    assert [t for c in chunks for t in c.choices[0].logprobs.tokens] == scores.tokens
    assert [o for c in chunks for o in c.choices[0].logprobs.text_offset] == scores.text_offset


@pytest.mark.parametrize("stream", (False, True))
def test_echo_scores_the_prompt(client: openai.OpenAI, tokenizer: Any, log_softmax: Any, stream: bool) -> None:
    """As evaluation harnesses use it: the log-probability of a text that they bring along."""
    text = "one two three four five six seven"
    tokens = tokenizer.encode(text)
    options = {**GREEDY, "prompt": text, "max_tokens": 1, "echo": True, "logprobs": 1}
    if stream:
        chunks = list(client.completions.create(**options, stream=True))
        shown = "".join(chunk.choices[0].text for chunk in chunks)
        values = [v for chunk in chunks for v in chunk.choices[0].logprobs.token_logprobs]
    else:
        choice = client.completions.create(**options).choices[0]
        shown, values = choice.text, choice.logprobs.token_logprobs
    assert shown.startswith(text)
    assert values[0] is None
    logp = log_softmax(tokens)
    expected = [float(logp[n, token]) for n, token in enumerate(tokens[1:])]
    assert values[1 : len(tokens)] == pytest.approx(expected, abs=1e-4)
    assert values[len(tokens)] == pytest.approx(float(logp[-1].max()), abs=1e-4)
    plain = client.completions.create(**{**options, "logprobs": None}).choices[0]
    assert plain.text == shown
    assert plain.logprobs is None


def test_logprobs_are_absent_unasked(client: openai.OpenAI) -> None:
    assert client.chat.completions.create(messages=CHAT, max_tokens=2, **GREEDY).choices[0].logprobs is None
    for chunk in client.completions.create(prompt="one", max_tokens=2, stream=True, **GREEDY):
        assert chunk.choices[0].logprobs is None


# ---- several choices ----


def test_choices_are_those_of_the_seeds_that_follow(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "base", "prompt": "one", "max_tokens": 20, "temperature": 1}
    several = client.completions.create(**options, seed=10, n=3)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    alone = [client.completions.create(**options, seed=10 + n) for n in range(3)]
    assert [choice.text for choice in several.choices] == [one.choices[0].text for one in alone]
    assert several.usage.completion_tokens == sum(one.usage.completion_tokens for one in alone)
    assert several.usage.prompt_tokens == alone[0].usage.prompt_tokens


@pytest.mark.parametrize("chat", (False, True))
def test_streamed_choices_are_those_of_the_whole(client: openai.OpenAI, chat: bool) -> None:
    options: dict[str, Any] = {"model": "base", "max_tokens": 20, "temperature": 1, "seed": 3, "n": 3}
    texts: dict[int, str] = {}
    if chat:
        whole = [c.message.content for c in client.chat.completions.create(messages=CHAT, **options).choices]
        for chunk in client.chat.completions.create(messages=CHAT, stream=True, **options):
            (choice,) = chunk.choices
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    else:
        whole = [c.text for c in client.completions.create(prompt="one", **options).choices]
        for part in client.completions.create(prompt="one", stream=True, **options):
            texts[part.choices[0].index] = texts.get(part.choices[0].index, "") + part.choices[0].text
    assert [texts[n] for n in range(3)] == whole
    assert len(set(whole)) > 1


def test_a_client_that_leaves_frees_all_choices(served: Any) -> None:
    body = {"model": "base", "prompt": "one", "max_tokens": 250, "ignore_eos": True, "n": 16, "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as answer:
        assert '"choices"' in next(answer.iter_lines())
    deadline = time.monotonic() + 20
    while served.call(served.agent.engine.in_flight):
        assert time.monotonic() < deadline
    shown = httpx.get(f"{served.admin_url}/metrics").text
    assert float(re.findall(r'coserve_requests_total{result="cancelled"} (\S+)', shown)[0]) > 0


# ---- the cache ----


def metric(served: Any, name: str) -> float:
    found = re.search(rf"^{name}{{[^}}]*}} (\S+)$", httpx.get(f"{served.admin_url}/metrics").text, re.MULTILINE)
    assert found
    return float(found[1])


def test_usage_says_what_was_cached(client: openai.OpenAI, served: Any) -> None:
    prompt = [7 + n % 90 for n in range(100)]
    first, second = (client.completions.create(prompt=prompt, max_tokens=3, **GREEDY) for _ in range(2))
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens == 64
    assert first.choices[0].text == second.choices[0].text
    usage = [
        chunk.usage
        for chunk in client.completions.create(
            prompt=prompt, max_tokens=3, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
        if chunk.usage
    ]
    assert [one.prompt_tokens_details.cached_tokens for one in usage] == [64]
    scored = client.completions.create(prompt=prompt, max_tokens=3, echo=True, logprobs=0, **GREEDY)
    assert scored.usage.prompt_tokens_details.cached_tokens == 0, "a prompt that is scored is computed"
    assert served.call(lambda: served.agent.metrics.last_load) is not None


def test_metrics_count_cached_tokens(client: openai.OpenAI, served: Any) -> None:
    """They come with the next load report."""
    prompt = [9 + n % 80 for n in range(65)]
    before = metric(served, "vllm:prefix_cache_hits_total")
    tried = 0
    while metric(served, "vllm:prefix_cache_hits_total") < before + 48:
        client.completions.create(prompt=prompt, max_tokens=40, **GREEDY)
        tried += 1
        assert tried < 50
    assert metric(served, "vllm:prefix_cache_queries_total") >= metric(served, "vllm:prefix_cache_hits_total")
    assert metric(served, "vllm:num_preemptions_total") == 0


def test_more_choices_than_may_ever_wait_are_refused_for_good(start_agent: Any) -> None:
    agent = start_agent(max_waiting=3)
    for body, field in (({"prompt": "one", "n": 4}, "n"), ({"prompt": ["one"] * 4}, "prompt")):
        answer = httpx.post(f"{agent.url}/v1/completions", json={"model": "base", "max_tokens": 2, **body}, timeout=60)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


def test_an_engine_that_is_full_is_429(start_agent: Any) -> None:
    """The agent counts what it sent; the engine has the last word."""
    agent = start_agent(max_waiting=1)
    engine = agent.agent.engine
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(engine), "waiting", lambda self: -100)
        patch.setattr(Generator, "check_choices", lambda self, prompts, request: None)
        options = {"model": "base", "prompt": "one", "max_tokens": 2, "n": 16}
        answers = [httpx.post(f"{agent.url}/v1/completions", json=options, timeout=60) for _ in range(3)]
    assert {answer.status_code for answer in answers} == {429}
    assert {answer.headers["retry-after"] for answer in answers} == {"1"}
    assert answers[0].json()["error"]["code"] == "overloaded"
    assert 'coserve_requests_total{result="refused"}' in httpx.get(f"{agent.admin_url}/metrics").text
    fine = httpx.post(f"{agent.url}/v1/completions", json={"model": "base", "prompt": "one"}, timeout=60)
    assert fine.status_code == 200


def test_prompts_of_a_list_are_drawn_independently_without_a_seed(client: openai.OpenAI) -> None:
    def texts(**options: Any) -> set[str]:
        answer = client.completions.create(
            model="base", prompt=["one two"] * 6, max_tokens=12, extra_body={"ignore_eos": True}, **options
        )
        return {choice.text for choice in answer.choices}

    assert len(texts()) > 1
    assert len(texts(seed=3)) == 1, "a seed is every prompt's"
