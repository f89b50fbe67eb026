"""A wrong variable is refused with its name, its value and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from coserve_agent.agent import device_choice, engine_config
from coserve_agent.engine.client import POLL_S
from coserve_agent.errors import StartError
from coserve_agent.http.servers import GRACEFUL_S
from coserve_agent.redis.finetuning import LEAVE_S
from coserve_agent.settings import AgentSettings, FeederSettings, read
from coserve_engine.config import DeviceChoice
from coserve_engine.host import EngineHost
from coserve_operator.manifests.agents import GRACE_S, PRE_STOP_S

FEEDER = {
    "REDIS_URL": "redis://redis:6379/0",
    "ENDPOINT_UID": "u-1",
    "JOB_UID": "j-1",
    "JOB_NAME": "job",
    "DATASET_PATH": "/data/x.jsonl",
    "MODEL_PATH": "/models/m",
    "EPOCHS": "2",
}


def environment(patch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        patch.setenv(f"COSERVE_{name}", value)


def test_an_agent_needs_only_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    blank = {"REDIS_URL": "", "MAX_SLOWDOWN_PERCENT": "", "PASS_BYTES": "", "KV_CACHE_BYTES": "", "MAX_REQUESTS": ""}
    environment(monkeypatch, {"MODEL_PATH": "/models/m", "FINETUNING": "Disabled", **blank})
    settings = read(AgentSettings)
    assert settings.model_path == Path("/models/m")
    assert settings.redis_url is None
    assert settings.max_slowdown_percent is None
    assert settings.pass_bytes is None
    assert device_choice(settings) == DeviceChoice()
    assert (settings.http_port, settings.admin_port, settings.finetuning) == (8000, 8001, "Disabled")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("TTFT_MS", "soon", ["COSERVE_TTFT_MS", "'soon'", "integer"]),
        ("TTFT_MS", "0", ["COSERVE_TTFT_MS", "greater"]),
        ("FINETUNING", "Maybe", ["COSERVE_FINETUNING", "'Maybe'", "Allowed"]),
        ("MAX_SLOWDOWN_PERCENT", "-1", ["COSERVE_MAX_SLOWDOWN_PERCENT", "greater"]),
        ("PASS_BYTES", "64Mi", ["COSERVE_PASS_BYTES", "'64Mi'", "integer"]),
        ("DEVICE", "cuda:1", ["COSERVE_DEVICE", "'cuda:1'", "'cuda'"]),
        ("DTYPE", "float16", ["COSERVE_DTYPE", "'float16'", "'bfloat16'"]),
        ("TOOL_CALL_PARSER", "xml", ["COSERVE_TOOL_CALL_PARSER", "'xml'", "'hermes'"]),
        ("NUMERICS_MODE", "exact", ["COSERVE_NUMERICS_MODE", "'exact'", "'Exact'"]),
        ("MAX_REQUESTS", "0", ["COSERVE_MAX_REQUESTS", "greater"]),
        ("MAX_BATCH_TOKENS", "64", ["COSERVE_MAX_BATCH_TOKENS", "greater"]),
        ("KV_CACHE_BYTES", "40Gi", ["COSERVE_KV_CACHE_BYTES", "'40Gi'", "integer"]),
        ("DRAIN_S", "41", ["COSERVE_DRAIN_S is 41", "COSERVE_SHUTDOWN_S 40", "smaller"]),
        ("HTTP_PORT", "70000", ["COSERVE_HTTP_PORT", "65535"]),
        ("ENDPOINT_UID", "a b", ["COSERVE_ENDPOINT_UID", "'a b'", "letters"]),
        ("REDIS_URL", "redis-host", ["REDIS_URL", "redis://"]),
        ("MODEL_NAME", "org model", ["COSERVE_MODEL_NAME", "'org model'", "org/model-8b"]),
        ("GENERATION_CONFIG", "vllm", ["COSERVE_GENERATION_CONFIG", "'vllm'", "Neutral"]),
        ("CORS_ORIGINS", "*,https://a.example.com/", ["COSERVE_CORS_ORIGINS", "a.example.com/", "no path"]),
    ],
)
def test_a_wrong_variable_is_explained(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: list[str]
) -> None:
    environment(monkeypatch, {"MODEL_PATH": "/models/m", name: value})
    with pytest.raises(StartError) as caught:
        read(AgentSettings)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_variable_in_other_letters_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint's template may set it, and it must not take the place of what the operator sets."""
    environment(monkeypatch, {"MODEL_PATH": "/models/m", "MODEL_NAME": "org/model-8b"})
    monkeypatch.setenv("coserve_model_name", "another")
    monkeypatch.setenv("Coserve_Model_Path", "/elsewhere")
    settings = read(AgentSettings)
    assert (settings.model_name, settings.model_path) == ("org/model-8b", Path("/models/m"))


def test_origins_are_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, {"MODEL_PATH": "/models/m", "CORS_ORIGINS": "https://a.example.com,http://localhost:3000"})
    assert read(AgentSettings).cors_origins == ("https://a.example.com", "http://localhost:3000")
    environment(monkeypatch, {"CORS_ORIGINS": ""})
    assert read(AgentSettings).cors_origins == ()


def test_a_missing_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StartError, match="COSERVE_MODEL_PATH is not set"):
        read(AgentSettings)


def test_the_password_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, {"MODEL_PATH": "/m", "REDIS_URL": "redis://r", "REDIS_PASSWORD": "hunter2"})
    assert "hunter2" not in repr(read(AgentSettings))


def test_the_engine_gets_what_an_agent_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"KV_CACHE_BYTES": "4194304", "PASS_BYTES": "1048576", "MAX_SLOWDOWN_PERCENT": "50"}
    told |= {"DEVICE": "cuda", "GPU_RESOURCE": "nvidia.com/gpu", "DTYPE": "bfloat16", "MAX_CONCURRENT_JOBS": "3"}
    told |= {"MAX_REQUESTS": "100", "MAX_BATCH_TOKENS": "4096", "IMAGE_KERNELS": "/kernels"}
    environment(monkeypatch, {"MODEL_PATH": "/models/m", **told})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/cache")
    config = engine_config(read(AgentSettings), (3, 5))
    assert (config.pass_bytes, config.max_slowdown_percent) == (1 << 20, 50)
    choice = DeviceChoice("cuda", "nvidia.com/gpu", "bfloat16", 100, 4096, 4 << 20, 3, "", "/cache", "/kernels")
    assert device_choice(read(AgentSettings)) == choice
    assert config.end_tokens == (3, 5)


@pytest.mark.parametrize("change", [{"MAX_STEPS": "5"}, {"EPOCHS": ""}])
def test_a_feeder_has_one_length(monkeypatch: pytest.MonkeyPatch, change: dict[str, str]) -> None:
    environment(monkeypatch, FEEDER)
    assert read(FeederSettings).epochs == 2
    environment(monkeypatch, change)
    with pytest.raises(StartError, match="exactly one of COSERVE_EPOCHS and COSERVE_MAX_STEPS"):
        read(FeederSettings)


def test_a_feeder_has_held_out_samples_from_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, FEEDER | {"EVAL_PATH": "/data/e.jsonl"})
    with pytest.raises(StartError, match="set COSERVE_EVAL_PERCENT to 0"):
        read(FeederSettings)
    environment(monkeypatch, {"EVAL_PERCENT": "0", "EVAL_MAX_SAMPLES": ""})
    settings = read(FeederSettings)
    assert (settings.eval_path, settings.eval_max_samples) == (Path("/data/e.jsonl"), None)


def test_an_agent_ends_within_the_grace_period_of_its_pod() -> None:
    """Everything at its longest: the drain, the last answers, the farewell to Redis, the reader, the engine."""
    settings = AgentSettings(model_path=Path("/models/m"))
    (close_s,) = EngineHost.close.__defaults__ or ()
    assert PRE_STOP_S + settings.shutdown_s + GRACEFUL_S + LEAVE_S + 4 * POLL_S + close_s < GRACE_S


def test_template_variables_are_a_json_object(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(
        monkeypatch, {"MODEL_PATH": "/models/m", "TEMPLATE_VARIABLES": '{"enable_thinking": false, "n": [1.5]}'}
    )
    assert read(AgentSettings).template_variables == {"enable_thinking": False, "n": [1.5]}
    for wrong in ("[]", "3", "{", "null", '{"x": NaN}', '{"x": 1e999}', '{"x": 1, "x": 2}', "[" * 100_000):
        environment(monkeypatch, {"TEMPLATE_VARIABLES": wrong})
        with pytest.raises(StartError, match="COSERVE_TEMPLATE_VARIABLES"):
            read(AgentSettings)


def test_the_state_of_jobs_is_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, {"MODEL_PATH": "/models/m", "STATE": "state", "DATA_ROOTS": "/a,/b"})
    settings = read(AgentSettings)
    assert settings.state == Path("state").absolute()
    assert settings.artifact_store == settings.state / "artifacts"
    assert settings.data_roots == (Path("/a"), Path("/b"))
    monkeypatch.setenv("COSERVE_DATA_ROOTS", "/a,b")
    with pytest.raises(StartError, match="COSERVE_DATA_ROOTS has 'b': name absolute folders"):
        read(AgentSettings)
    monkeypatch.setenv("COSERVE_REDIS_URL", "redis://redis:6379/0")
    with pytest.raises(StartError, match=r"COSERVE_STATE is .* and COSERVE_REDIS_URL is set"):
        read(AgentSettings)


def test_a_feeder_has_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, {name: value for name, value in FEEDER.items() if name != "REDIS_URL"})
    with pytest.raises(StartError, match="set COSERVE_REDIS_URL, or COSERVE_STATE"):
        read(FeederSettings)
    monkeypatch.setenv("COSERVE_STATE", "/state")
    assert read(FeederSettings).state == Path("/state")
