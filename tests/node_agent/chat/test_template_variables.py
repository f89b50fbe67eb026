"""Template variables over HTTP, the request's before the endpoint's, and end tokens that only the template names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from chat_templates import all_templates, write_folder
from small_models import write_model
from transformers import PreTrainedTokenizerFast

from coserve_agent.agent import Agent
from coserve_agent.chat.end_tokens import end_tokens
from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.chat.variables import TemplateVariableError, rendering_file, variables_of
from coserve_agent.data.rendering import Renderer
from coserve_agent.errors import StartError
from coserve_agent.settings import AgentSettings

CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with Qwen3's template, whose files name no end token."""

    def write(folder: Path, template: str) -> int:
        write_folder(folder, template, "bytes")
        return len(PreTrainedTokenizerFast.from_pretrained(str(folder)))

    path = write_model(tmp_path_factory.mktemp("qwen"), all_templates()["qwen3"], write)
    (path / "generation_config.json").unlink()
    for name in ("config.json", "tokenizer_config.json"):
        values = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps(values | {"eos_token_id": None, "eos_token": None}))
    return path


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def client(start_agent: Callable[..., Any], folder: Path) -> Iterator[httpx.Client]:
    agent = start_agent(model_path=folder, template_variables={"enable_thinking": False})
    with httpx.Client(base_url=agent.url, timeout=60) as client:
        yield client


def ask(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/v1/chat/completions", json={"messages": CHAT, "max_tokens": 2, **body})


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, False), ({}, False), ({"enable_thinking": None}, False), ({"enable_thinking": True}, True)],
)
def test_a_requests_variables_come_before_the_endpoints(
    client: httpx.Client, reference: Any, given: Any, expected: bool
) -> None:
    answer = ask(client, chat_template_kwargs=given, return_token_ids=True)
    assert answer.status_code == 200, answer.text
    text = reference.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True, enable_thinking=expected)
    assert answer.json()["prompt_token_ids"] == reference(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "name", ["enable_thinkin", "messages", "tools", "add_generation_prompt", "bos_token", "range", ""]
)
def test_what_the_template_does_not_read_is_refused(client: httpx.Client, name: str) -> None:
    answer = ask(client, chat_template_kwargs={name: True})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "chat_template_kwargs"
    assert repr(name) in error["message"] and "it reads enable_thinking" in error["message"]


def nested(depth: int) -> Any:
    """The values of an object that is `depth` deep, this one included."""
    value: Any = True
    for n in range(depth - 1):
        value = [value] if n % 2 else {"x": value}
    return value


BOUNDS = [
    (nested(33), "nested more than 32 deep"),
    (nested(200), "nested more than 32 deep"),
    (nested(600), "nested more than 32 deep"),
    ("é" * 8200, "bytes of JSON, and 16384 are allowed"),
    (list(range(10_000)), "bytes of JSON, and 16384 are allowed"),
]


@pytest.mark.parametrize(("value", "words"), BOUNDS, ids=range(len(BOUNDS)))
async def test_variables_are_bounded_for_whoever_sets_them(
    client: httpx.Client, settings: Callable[..., AgentSettings], folder: Path, value: Any, words: str
) -> None:
    answer = ask(client, chat_template_kwargs={"enable_thinking": value})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "chat_template_kwargs")
    assert error["message"].startswith("chat_template_kwargs ") and words in error["message"]
    assert len(error["message"]) < 200
    given = {"enable_thinking": value}
    with pytest.raises(StartError, match=rf"engine\.templateVariables .*{words}"):
        Agent(settings(model_path=folder, template_variables=given))
    tokenizer = Tokenizer(folder)
    with pytest.raises(TemplateVariableError, match=rf"^templateVariables .*{words}"):
        Renderer(tokenizer, end_tokens(folder, tokenizer), given)


@pytest.mark.parametrize("value", [nested(32), "é" * 8000, [[]] * 4000, {}])
def test_variables_within_the_bounds_are_taken(client: httpx.Client, value: Any) -> None:
    answer = ask(client, chat_template_kwargs={"enable_thinking": value})
    assert answer.status_code == 200, answer.text


async def test_an_endpoints_variable_that_the_template_does_not_read(
    settings: Callable[..., AgentSettings], folder: Path
) -> None:
    with pytest.raises(StartError, match=r"engine\.templateVariables has 'thinking'.*it reads enable_thinking"):
        Agent(settings(model_path=folder, template_variables={"thinking": False}))


def test_an_answer_ends_where_the_template_ends_a_turn(client: httpx.Client, reference: Any) -> None:
    end, other = reference.convert_tokens_to_ids(["<|im_end|>", "a"])
    biased = {
        "logit_bias": {str(end): 100, str(other): 60},
        "temperature": 0,
        "max_tokens": 4,
        "return_token_ids": True,
    }

    def said(**body: Any) -> tuple[list[int], str]:
        (choice,) = ask(client, **biased, **body).json()["choices"]
        return choice["token_ids"], choice["finish_reason"]

    assert said() == ([end], "stop")
    assert said(ignore_eos=True) == ([end] * 4, "length")
    assert said(ignore_eos=True, stop_token_ids=[end]) == ([end], "stop"), "the request's own remain"
    assert said(min_tokens=2) == ([other, other, end], "stop")


def test_an_adapter_says_with_which_it_was_trained(tmp_path: Path) -> None:
    assert variables_of(tmp_path) == {}
    (tmp_path / "rendering.json").write_text(rendering_file({"enable_thinking": False}, "0" * 64))
    assert variables_of(tmp_path) == {"enable_thinking": False}
    for text in ("{", "[]", '{"template_variables": 3}'):
        (tmp_path / "rendering.json").write_text(text)
        assert variables_of(tmp_path) == {}
