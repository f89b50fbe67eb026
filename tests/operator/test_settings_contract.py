"""Whatever the API server takes of an endpoint and a job, their pods take: from the CRDs through the operator's own
builders into the settings of agent and feeder, and the binding that an agent reads.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from crd_strategies import objects
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError, field_validator

from coserve_agent.agent import device_choice, engine_config
from coserve_agent.errors import StartError
from coserve_agent.settings import AgentSettings, FeederSettings, read
from coserve_api.common import duration_ms
from coserve_api.endpoint import InferenceEndpoint, KernelFallback
from coserve_api.job import FinetuneJob
from coserve_api.quantities import quantity_bytes
from coserve_contract.messages import Binding, Desired
from coserve_contract.store import JobRecord
from coserve_engine.config import ModelConfig, Rope
from coserve_engine.hardware import CUDA, Hardware
from coserve_engine.memory import plan_memory, sequence_bytes
from coserve_operator.decide.binding import binding_of
from coserve_operator.decide.sources import continued_from, is_uri
from coserve_operator.manifests import agents, feeder
from coserve_operator.tenants import RedisAccess

EXAMPLES = Path(__file__).parents[2] / "examples"
REDIS = RedisAccess("redis://coserve-redis-ml.coserve-system.svc:6379/0", "cs-e-1", "password", digest="0123456789")
UIDS = st.uuids().map(str)
ENDPOINTS = objects("inferenceendpoints.yaml", UIDS)
JOBS = objects("finetunejobs.yaml", UIDS)
MANY = settings(max_examples=100, suppress_health_check=list(HealthCheck))


def accepted(kind: Any, body: dict[str, Any]) -> Any:
    """The object, where it keeps the rules between its fields, too."""
    try:
        made = kind.from_dict(body)
    except ValidationError:
        assume(False)
    scaling = getattr(made.spec, "autoscaling", None)
    assume(scaling is None or scaling.min_replicas <= scaling.max_replicas)
    return made


def environment(manifest: dict[str, Any], pod: str) -> dict[str, str]:
    """A container's variables as the kubelet sets them."""
    downward = {"metadata.name": pod, "metadata.uid": "0b1c5a3e-9d7f-4f43-8d1c-0a6f6f6f1a2b", "spec.nodeName": "node-1"}
    values: dict[str, str] = {}
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    for one in container["env"]:
        assert one["name"] not in values, "server-side apply takes no variable twice"
        source = one.get("valueFrom", {})
        given = downward.get(source.get("fieldRef", {}).get("fieldPath"), one.get("value", "secret"))
        values[one["name"]] = expanded(given, values) if "value" in one else given
    return values


def expanded(text: str, values: dict[str, str]) -> str:
    """$(NAME) is the variable NAME where it is there before, and $$ is $ (k8s.io/kubernetes/third_party/forked/golang/
    expansion).
    """
    return re.sub(
        r"\$(\$|\((.*?)\))",
        lambda found: "$" if found[1] == "$" else values.get(found[2], found[0]),
        text,
        flags=re.DOTALL,
    )


def settings_of(kind: Any, manifest: dict[str, Any], pod: str) -> Any:
    with mock.patch.dict(os.environ, environment(manifest, pod), clear=True):
        return read(kind)


@MANY
@given(ENDPOINTS)
def test_an_agent_takes_every_endpoint(body: dict[str, Any]) -> None:
    endpoint = accepted(InferenceEndpoint, body)
    manifest = agents.deployment(endpoint, 1, "agent:1", REDIS)
    got = settings_of(AgentSettings, manifest, f"{endpoint.metadata.name}-5d9c7b9f6b-x2x4z")
    spec = endpoint.spec
    assert (got.endpoint_uid, got.endpoint_name) == (endpoint.metadata.uid, endpoint.metadata.name)
    assert (got.model_name, got.max_model_length) == (endpoint.model_name, spec.model.max_model_length)
    assert (got.ttft_ms, got.tpot_ms) == tuple(
        map(duration_ms, (spec.slo.time_to_first_token, spec.slo.time_per_output_token))
    )
    assert (got.finetuning, got.max_rank) == (spec.finetuning.policy, spec.finetuning.max_rank)
    assert got.max_slowdown_percent is None, "bindings say it, so that it may change"
    cache = spec.engine.kv_cache_memory
    assert got.kv_cache_bytes == (None if cache is None else quantity_bytes(cache))
    assert (got.generation_config, got.cors_origins) == (spec.engine.generation_config, spec.cors.allow_origins)
    assert got.tool_call_parser == spec.engine.tool_call_parser
    assert engine_config(got, ()).numerics_mode == spec.engine.numerics_mode.lower()
    allowed = spec.engine.kernel_fallback is KernelFallback.ALLOWED
    assert engine_config(got, ()).kernel_fallback == allowed
    choice = device_choice(got)
    assert (choice.device, choice.dtype) == (spec.engine.device, spec.engine.dtype)
    assert (choice.max_requests, choice.max_batch_tokens) == (spec.engine.max_requests, spec.engine.max_batch_tokens)
    assert choice.max_jobs == max(1, spec.finetuning.jobs)
    assert got.template_variables == spec.engine.template_variables


@MANY
@given(ENDPOINTS, JOBS)
def test_a_feeder_and_an_agent_take_every_job(endpoint_body: dict[str, Any], job_body: dict[str, Any]) -> None:
    endpoint, job = accepted(InferenceEndpoint, endpoint_body), accepted(FinetuneJob, job_body)
    got = settings_of(FeederSettings, feeder.feeder(job, endpoint, "agent:1", REDIS), f"{job.metadata.name}-feeder-x2x")
    training = job.spec.training
    assert (got.job_uid, got.job_name) == (job.metadata.uid, job.metadata.name)
    assert (got.epochs, got.max_steps) == (training.epochs, training.max_steps)
    assert (got.batch_size, got.seed) == (training.batch_size, training.seed)
    served_with = {**endpoint.spec.engine.template_variables, **job.spec.dataset.template_variables}
    assert got.template_variables == served_with
    assert got.max_sequence_length == (job.spec.dataset.max_sequence_length or endpoint.spec.model.max_model_length)
    binding = binding_of(job, endpoint, 1, Desired.RUN, 1, 0, JobRecord(), continued_from(job, endpoint, {}))
    assert Binding.loads("key", binding.dumps()) == binding
    assert binding.spec.template_variables == served_with
    assert binding.spec.max_slowdown_percent == endpoint.spec.finetuning.max_slowdown_percent
    named = job.spec.adapter.source is not None and is_uri(job.spec.adapter.source)
    assert (binding.spec.start is not None) == (binding.spec.rank is None) == named


@pytest.mark.parametrize("free_gb", (140, 79))
def test_the_example_for_a_gpu_fits_its_cards(free_gb: int) -> None:
    """An H200 and a card of 80 GB: Llama-3.1-8B by its config.json, with more than one long request in the cache."""
    body = yaml.safe_load((EXAMPLES / "endpoint-gpu.yaml").read_text())
    endpoint = InferenceEndpoint.from_dict(body | {"metadata": {"name": "llama", "uid": "u-1"}})
    got = settings_of(AgentSettings, agents.deployment(endpoint, 1, "agent:1", REDIS), "pod-1")
    choice = device_choice(got)
    assert (choice.device, choice.gpu_resource, choice.kv_cache_bytes) == ("cuda", "nvidia.com/gpu", None)
    config = replace(engine_config(got, ()), dtype="bfloat16", max_requests=256, max_batch_tokens=8192)
    windows: tuple[int | None, ...] = (None,) * 32
    rope = Rope(5e5)
    model = ModelConfig(128256, 4096, 32, 32, 8, 128, 14336, 1e-5, rope, 131072, (), False, windows, False, ())
    card = Hardware(CUDA, "GPU", free_gb * 10**9, free_gb * 10**9)
    plan = plan_memory(model, config, card, choice.kv_cache_bytes, choice.max_jobs)
    assert plan.kv_bytes > 16 * sequence_bytes(model, config)


def test_a_template_variable_is_what_its_author_wrote(make) -> None:
    """Kubernetes leaves it as it is, and so learned is what is served: the binding has it from the job itself."""
    said = {"system": "costs $$5, not $(COSERVE_ENDPOINT_UID) or $(HOME), $", "$$": "$$$$(HOME)"}
    endpoint = make.endpoint(engine={"templateVariables": said})
    job = make.job(dataset={"uri": "pvc://data/x.jsonl", "templateVariables": said})
    fed = settings_of(FeederSettings, feeder.feeder(job, endpoint, "agent:1", REDIS), "feeder-1")
    agent = settings_of(AgentSettings, agents.deployment(endpoint, 1, "agent:1", REDIS), "pod-1")
    assert fed.template_variables == agent.template_variables == said


def test_a_narrower_setting_would_be_found() -> None:
    """Negative control: with the pattern that once refused the CRD's own example, the same objects fail."""

    class Narrow(AgentSettings):
        @field_validator("model_name")
        @classmethod
        def _without_slash(cls, name: str) -> str:
            if "/" in name:
                raise ValueError("no slash")
            return name

    @settings(MANY, database=None, phases=(Phase.generate,))
    @given(ENDPOINTS)
    def every(body: dict[str, Any]) -> None:
        manifest = agents.deployment(accepted(InferenceEndpoint, body), 1, "agent:1", REDIS)
        settings_of(Narrow, manifest, "pod-1")

    with pytest.raises(StartError, match="no slash"):
        every()
