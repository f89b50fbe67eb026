"""The OpenAI-compatible API, through an unmodified openai client and through plain HTTP, on a real server and a real
engine.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from coserve_agent.engine.client import TokenStream

CHAT = [{"role": "user", "content": "the quick brown fox"}]


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


# ---- answers ----


def test_chat_answers_with_usage(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="base", messages=CHAT, max_tokens=12, temperature=0)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.completion_tokens <= 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_streaming_equals_non_streaming(client: openai.OpenAI, temperature: float) -> None:
    options: dict[str, Any] = {
        "model": "base",
        "messages": CHAT,
        "max_completion_tokens": 60,
        "temperature": temperature,
        "seed": 5,
        "extra_body": {"ignore_eos": True},
    }
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


def test_text_is_that_of_the_tokens(client: openai.OpenAI, served: Any) -> None:
    """A random model writes broken characters: the pieces joined must be what decoding everything at once gives."""
    prompt = served.agent.tokenizer.encode("the quick")
    seen: list[int] = []
    stream_type = type(served.agent.engine).generate

    def spy(self: Any, request: Any, observe: Any = lambda s: None) -> Any:
        stream = stream_type(self, request, observe)
        deliver = stream.deliver
        stream.deliver = lambda token, passage: (seen.append(token.token), deliver(token, passage))
        return stream

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(served.agent.engine), "generate", spy)
        text = client.completions.create(
            model="base", prompt=prompt, max_tokens=80, temperature=1, seed=3, extra_body={"ignore_eos": True}
        )
    assert len(seen) == 80
    assert text.choices[0].text == served.agent.tokenizer.decode(seen)


def test_completions_take_strings_and_tokens(client: openai.OpenAI, served: Any) -> None:
    options: dict[str, Any] = {"model": "base", "temperature": 0, "max_tokens": 8}
    by_text = client.completions.create(prompt="one two", **options)
    by_tokens = client.completions.create(prompt=served.agent.tokenizer.encode("one two"), **options)
    assert by_text.choices[0].text == by_tokens.choices[0].text
    streamed = client.completions.create(prompt="one two", stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in streamed) == by_text.choices[0].text
    assert client.completions.create(prompt="one two", model="base").usage.completion_tokens <= 16


def test_seed_decides_the_sample(client: openai.OpenAI) -> None:
    def text(seed: int | None) -> str:
        options: dict[str, Any] = {"max_tokens": 30, "temperature": 1.0, "seed": seed}
        return client.completions.create(model="base", prompt="one", **options).choices[0].text

    assert text(1) == text(1)
    assert len({text(seed) for seed in (1, 2, 3)}) > 1
    assert len({text(None) for _ in range(3)}) > 1


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_stop_strings_cut_anywhere(client: openai.OpenAI, length: int) -> None:
    options: dict[str, Any] = {
        "model": "base",
        "prompt": "one two three",
        "max_tokens": 60,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    full = client.completions.create(**options).choices[0].text
    for at in range(5, len(full) - length, 7):
        stop = full[at : at + length]
        cut = client.completions.create(stop=[stop, "\x00never"], **options).choices[0]
        assert cut.text == full[: full.index(stop)]
        assert cut.finish_reason == "stop"
        chunks = list(client.completions.create(stop=stop, stream=True, **options))
        assert "".join(chunk.choices[0].text for chunk in chunks) == cut.text
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_stop_token_ids_end_an_answer(client: openai.OpenAI, served: Any) -> None:
    options: dict[str, Any] = {"model": "base", "prompt": "one two three", "temperature": 0, "max_tokens": 20}
    full = client.completions.create(**options, extra_body={"ignore_eos": True}).choices[0].text
    first = served.agent.tokenizer.encode(full)[0]
    cut = client.completions.create(**options, extra_body={"stop_token_ids": [first], "ignore_eos": True})
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage.completion_tokens <= 20


def test_models_are_listed(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "base"
    assert client.models.retrieve("base").id == "base"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_small_routes(http: httpx.Client, served: Any) -> None:
    assert http.get("/health").json() == http.get("/ping").json() == {"status": "ok"}
    assert http.get("/version").json()["version"]
    tokens = http.post("/tokenize", json={"prompt": "one two 😀"}).json()
    assert tokens["count"] == len(tokens["tokens"])
    assert http.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": "one two 😀"}


TIMES = {"time_to_first_token_ms", "generation_time_ms", "queue_time_ms", "mean_itl_ms", "tokens_per_second"}


def test_an_answer_carries_its_times_where_they_are_asked_for(http: httpx.Client) -> None:
    body = {"model": "base", "max_tokens": 8, "ignore_eos": True, "include_metrics": True}
    chat, text, response = body | {"messages": CHAT}, body | {"prompt": "one"}, body | {"input": "one"}
    del response["max_tokens"], response["ignore_eos"]
    for path, asked in (("chat/completions", chat), ("completions", text), ("responses", response)):
        metrics = http.post(f"/v1/{path}", json=asked).json()["metrics"]
        assert metrics.keys() == TIMES
        decode_ms, gap_ms = metrics["generation_time_ms"], metrics["mean_itl_ms"]
        assert all(value >= 0 for value in metrics.values())
        if path != "responses":
            assert abs(decode_ms - 7 * gap_ms) < 0.01
        assert "metrics" not in http.post(f"/v1/{path}", json=asked | {"include_metrics": False}).json()
    assert http.post("/v1/chat/completions", json=chat | {"n": 2}).json()["metrics"] is None
    assert http.post("/v1/completions", json=text | {"prompt": ["a", "b"]}).json()["metrics"] is None

    def last(path: str, asked: dict[str, Any]) -> Any:
        with http.stream("POST", f"/v1/{path}", json=asked | {"stream": True}) as answer:
            lines = [line for line in answer.iter_lines() if line.startswith("data: {")]
        assert [line for line in lines if '"metrics"' in line] == lines[-1:]
        return json.loads(lines[-1].removeprefix("data: "))

    assert last("chat/completions", chat | {"stream_options": {"include_usage": True}})["metrics"].keys() == TIMES
    assert last("responses", response)["response"]["metrics"].keys() == TIMES
    refused = http.post("/v1/chat/completions", json=chat | {"stream": True})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "include_metrics")


def test_load_counts_requests_that_are_being_answered(
    served: Any, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vLLM does: requests, however many choices they have."""
    go_on, next_tokens = served.call(asyncio.Event), TokenStream.next_tokens

    async def held(self: TokenStream) -> Any:
        await go_on.wait()
        return await next_tokens(self)

    monkeypatch.setattr(TokenStream, "next_tokens", held)
    body = {"model": "base", "messages": CHAT, "max_tokens": 3, "n": 2}
    asking = threading.Thread(target=lambda: http.post("/v1/chat/completions", json=body))
    asking.start()
    try:
        wait_for(lambda: http.get("/load").json() == {"server_load": 1})
    finally:
        served.call(go_on.set)
        asking.join()
    assert http.get("/load").json() == {"server_load": 0}
    assert http.post("/v1/chat/completions", json=body | {"max_tokens": 9999}).status_code == 400
    assert http.get("/load").json() == {"server_load": 0}


def test_admin_port_shows_what_happened(served: Any, client: openai.OpenAI) -> None:
    before = httpx.get(f"{served.admin_url}/debug/iterations").json()["iterations"]
    since = before[-1]["started"] if before else 0.0
    client.completions.create(model="base", prompt="one", max_tokens=5, extra_body={"ignore_eos": True})
    wait_for(
        lambda: (
            sum(
                row["decode"] + (row["prefill"] > 0)
                for row in httpx.get(f"{served.admin_url}/debug/iterations?since={since}").json()["iterations"]
            )
            >= 5
        )
    )
    text = httpx.get(f"{served.admin_url}/metrics").text
    for name in (
        'vllm:num_requests_waiting{model_name="base"}',
        "vllm:num_requests_running",
        "vllm:kv_cache_usage_perc",
        'coserve_tokens_total{kind="decode"}',
        "coserve_saturation_percent",
        "coserve_slo_attainment_percent",
        "coserve_time_to_first_token_seconds_bucket",
        "coserve_inter_token_seconds_bucket",
        "coserve_iteration_seconds_bucket",
        "coserve_iterations_total",
        "coserve_iterations_over_bound_total",
        'coserve_kernel_fallbacks{reason="triton"} 0.0',
        'coserve_requests_total{result="ok"}',
        'vllm:prefix_cache_queries_total{model_name="base"}',
        'vllm:prefix_cache_hits_total{model_name="base"}',
        'vllm:num_preemptions_total{model_name="base"}',
    ):
        assert name in text
    assert httpx.get(f"{served.admin_url}/ready").json() == {"status": "ready"}
    assert httpx.get(f"{served.admin_url}/v1/models").status_code == 404


# ---- clients that leave, wait, or read slowly ----


def decoded(served: Any) -> int:
    """Tokens decoded so far."""
    return int(sum(row["decode"] for row in httpx.get(f"{served.admin_url}/debug/iterations").json()["iterations"]))


def in_flight(served: Any) -> int:
    return int(served.call(served.agent.engine.in_flight))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_request(served: Any, http: httpx.Client, stream: bool) -> None:
    body = json.dumps(
        {"model": "base", "prompt": "one", "max_tokens": 250, "ignore_eos": True, "stream": stream, "temperature": 0}
    ).encode()
    before = decoded(served)
    with socket.create_connection(("127.0.0.1", served.agent.http.port)) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        wait_for(lambda: in_flight(served) == 1)
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
    wait_for(lambda: in_flight(served) == 0)
    assert 'coserve_requests_total{result="cancelled"}' in httpx.get(f"{served.admin_url}/metrics").text
    assert http.post("/v1/completions", json={"model": "base", "prompt": "one"}).status_code == 200
    assert decoded(served) - before < 240  # of 250 + 16: the engine did not finish it


def test_a_client_that_reads_slowly_holds_up_nobody(served: Any, client: openai.OpenAI) -> None:
    body = json.dumps(
        {"model": "base", "prompt": "one", "max_tokens": 200, "ignore_eos": True, "stream": True}
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        slow.connect(("127.0.0.1", served.agent.http.port))
        slow.sendall(head.encode() + body)
        wait_for(lambda: in_flight(served) >= 1)
        for _ in range(3):
            answer = client.completions.create(model="base", prompt="two", max_tokens=20)
            assert answer.choices[0].finish_reason in ("stop", "length")


def test_requests_at_once_get_their_own_answers(client: openai.OpenAI) -> None:
    prompts = [f"one two {n}" for n in range(12)]

    def ask(prompt: str) -> str:
        return client.completions.create(model="base", prompt=prompt, max_tokens=20, temperature=0).choices[0].text

    alone = [ask(prompt) for prompt in prompts]
    together: dict[str, str] = {}
    threads = [threading.Thread(target=lambda p=p: together.__setitem__(p, ask(p))) for p in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[prompt] for prompt in prompts] == alone


def test_too_many_waiting_requests_are_turned_away(start_agent: Callable[..., Any]) -> None:
    """Room for one request in the cache, and for two that wait: of 16 at once some are refused, and come again."""
    agent = start_agent(kv_cache_bytes=5 << 14, max_waiting=2)
    codes: list[int] = []
    retry_after: list[str | None] = []

    def ask(n: int) -> None:
        prompt = {"model": "base", "prompt": [5 + n] * 150, "max_tokens": 100, "ignore_eos": True}
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            answer = httpx.post(f"{agent.url}/v1/completions", json=prompt, timeout=60)
            codes.append(answer.status_code)
            if answer.status_code != 429:
                break
            retry_after.append(answer.headers.get("retry-after"))
            time.sleep(0.1)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes.count(200) == 16
    assert set(codes) == {200, 429}
    assert set(retry_after) == {"1"}
    assert agent.call(lambda: agent.agent.meter.report().attainment_percent) < 100
