"""The OpenAPI page: it describes the routes that are there, and whatever it allows, and much that it does not, is
answered without a mistake of the server's.
"""

from __future__ import annotations

import copy
from typing import Any

import httpx
import jsonschema
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

CHAT = [{"role": "user", "content": "one"}]
LOOK = {"name": "look", "input_schema": {"type": "object", "properties": {}}}
GOOD: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {"messages": CHAT, "max_tokens": 2, "temperature": 0.5, "logit_bias": {"5": 1}, "user": "u", "store": True},
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "one"}]}],
            "max_tokens": 2,
            "n": 2,
            "stop": "x",
        },
    ],
    "/v1/completions": [{"prompt": "one", "max_tokens": 2, "echo": True}, {"prompt": [[5, 6], [7]], "max_tokens": 1}],
    "/v1/responses": [
        {"input": "one", "max_output_tokens": 2, "metadata": {"a": "b"}, "truncation": "disabled"},
        {
            "input": [*CHAT, {"type": "reasoning", "summary": []}],
            "max_output_tokens": 2,
            "stop": ["x"],
            "tool_choice": "auto",
        },
    ],
    "/v1/messages": [
        {"messages": CHAT, "max_tokens": 2, "top_k": 3, "metadata": {"user_id": "u"}},
    ],
    "/v1/messages/count_tokens": [{"messages": CHAT}],
    "/tokenize": [{"prompt": "one", "add_special_tokens": False}],
    "/detokenize": [{"tokens": [5, 6]}],
}
MOST_TOKENS = 4
"""Of a generated request: what it says otherwise is what is tried."""


@pytest.fixture(scope="module")
def page(served: Any) -> dict[str, Any]:
    page = httpx.get(f"{served.url}/openapi.json").json()
    assert isinstance(page, dict)
    return page


def test_it_describes_the_routes_that_are_there(page: dict[str, Any], http: httpx.Client) -> None:
    assert page["paths"].keys() == GOOD.keys() | {
        "/v1/models", "/v1/models/{name}", "/health", "/ping", "/load", "/version",
    }  # fmt: skip
    assert http.get("/docs").status_code == http.get("/redoc").status_code == 404
    for path, operations in page["paths"].items():
        if "get" in operations and "{" not in path:
            assert http.get(path).status_code == 200
            assert operations["get"]["responses"].keys() == {"200"}


@pytest.mark.parametrize("path", GOOD)
def test_what_is_answered_is_what_it_allows(page: dict[str, Any], http: httpx.Client, path: str) -> None:
    """Good requests are valid by it, with a model's name and without, and their answers too; a field that it does not
    know is refused.
    """
    operation = page["paths"][path]["post"]
    validator = jsonschema.Draft202012Validator
    body = validator({**operation["requestBody"]["content"]["application/json"]["schema"], **_root(page)})
    answer = validator({**operation["responses"]["200"]["content"]["application/json"]["schema"], **_root(page)})
    error = validator({**operation["responses"]["400"]["content"]["application/json"]["schema"], **_root(page)})
    for good in GOOD[path]:
        for one in (good, good | {"model": "base"}):
            body.validate(one)
            response = http.post(path, json=one)
            assert response.status_code == 200, response.text
            answer.validate(response.json())
        assert not body.is_valid(good | {"mood": 1})
        refused = http.post(path, json=good | {"mood": 1})
        assert refused.status_code == 400
        error.validate(refused.json())


def test_it_has_no_field_of_another_api(page: dict[str, Any]) -> None:
    fields = page["components"]["schemas"]["MessagesRequest"]["properties"]
    assert fields["stop"].keys() == {"description"}  # neutral where it is empty alone
    assert "stop_sequences" in fields and "max_output_tokens" not in fields


def _root(page: dict[str, Any]) -> dict[str, Any]:
    """What references of a schema lead into."""
    return {"components": page["components"]}


def generated(page: dict[str, Any]) -> Any:
    """The page for generated requests: for the model that is served, and for few tokens."""
    page = copy.deepcopy(page)
    for schema in page["components"]["schemas"].values():
        fields = schema.get("properties", {})
        if "model" in fields:
            fields["model"] = {"enum": ["base", "", None]}
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if name in fields:
                fields[name] = {"type": "integer", "minimum": 1, "maximum": MOST_TOKENS}
                schema["required"] = sorted({*schema.get("required", ()), name})
    return schemathesis.openapi.from_dict(page)


def tried(session: requests.Session, url: str, operation: Any, examples: int) -> int:
    """Send generated requests to one route; how many were answered by 200."""
    documented = operation.definition.raw["responses"].keys()
    answered = 0

    @settings(
        max_examples=examples, database=None, deadline=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in GenerationMode)), st.data())
    def answers(case: Any, data: st.DataObject) -> None:
        nonlocal answered
        responses = [case.call(base_url=url, session=session)]
        if operation.path in GOOD and isinstance(case.body, dict) and case.body:
            # Few such are right as a whole: each field also stands in a request that is.
            name = data.draw(st.sampled_from(sorted(case.body)))
            case.body = GOOD[operation.path][0] | {name: case.body[name]}
            responses.append(case.call(base_url=url, session=session))
        for response in responses:
            kind = response.headers["content-type"][0].partition(";")[0]
            assert response.status_code < 500, response.text
            assert str(response.status_code) in documented, response.text
            assert kind in ("application/json", "text/event-stream")
            assert not (kind == "text/event-stream" and "see the agent's log" in response.text), response.text
            answered += response.status_code == 200

    answers()
    return answered


def tried_all(page: dict[str, Any], url: str, examples: int) -> int:
    with requests.Session() as session:
        return sum(tried(session, url, one.ok(), examples) for one in generated(page).get_all_operations())


def test_no_request_is_a_mistake_of_the_servers(page: dict[str, Any], served: Any) -> None:
    assert tried_all(page, served.url, 15) > 30


@pytest.mark.nightly
def test_no_request_of_very_many_is_a_mistake_of_the_servers(page: dict[str, Any], hermes: Any) -> None:
    """On a model that calls tools, too."""
    assert tried_all(page, hermes.url, 300) > 800
