"""InferenceEndpoint: one base model, served by N agents under a latency promise."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue
from pydantic.alias_generators import to_camel

from coserve_api.adapters import MAX_ADAPTERS, AdapterOverride
from coserve_api.common import (
    BatchTokens,
    ConcurrentJobs,
    Duration,
    ModelLength,
    ModelName,
    ObjectMeta,
    Origin,
    Percentile,
    Rank,
    Requests,
    SlowdownPercent,
    SpecModel,
    Subdomain,
    TemplateVariables,
    Threads,
    Window,
)
from coserve_api.endpoint_status import MAX_AGENTS, EndpointStatus
from coserve_api.pods import FeederTemplate, PodTemplate
from coserve_api.quantities import Memory
from coserve_api.uris import ARTIFACTS_ROOT, MODELS_ROOT, ArtifactsUri, ModelUri


class FinetuningPolicy(StrEnum):
    ALLOWED = "Allowed"
    DISABLED = "Disabled"


class ToolCallParser(StrEnum):
    """In vLLM's words."""

    HERMES = "hermes"
    LLAMA3_JSON = "llama3_json"
    MISTRAL = "mistral"


class GenerationConfig(StrEnum):
    MODEL = "Model"
    NEUTRAL = "Neutral"


class Device(StrEnum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Dtype(StrEnum):
    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class NumericsMode(StrEnum):
    FAST = "Fast"
    EXACT = "Exact"


class KernelFallback(StrEnum):
    FORBIDDEN = "Forbidden"
    ALLOWED = "Allowed"


class Model(SpecModel):
    """The base model. Immutable: create another endpoint for another model."""

    uri: ModelUri
    """A Hugging Face folder: pvc://CLAIM/PATH, or file:///models/PATH in the pod."""
    name: ModelName | None = None
    """What clients give as `model`. Default: the object's name."""
    max_model_length: ModelLength = 1024
    """The most tokens of prompt and answer together."""


class Slo(SpecModel):
    """The latency promise."""

    time_to_first_token: Duration = "1s"
    """From the arrival of a request to its first token."""
    time_per_output_token: Duration = "200ms"
    """Between tokens of an answer."""
    percentile: Percentile = 99
    """The share of requests, in percent, that must attain both."""


class ScalingRule(SpecModel):
    """How long a wish to scale must have lasted."""

    stabilization_window: Window
    """Scale only by what was wished all through this window."""


class ScaleUp(ScalingRule):
    stabilization_window: Window = "0s"
    """Scale up only by what was wished all through this window."""


class ScaleDown(ScalingRule):
    stabilization_window: Window = "5m"
    """Scale down only by what was wished all through this window; choose it no shorter than the loading of the model.
    """


class ScalingBehavior(SpecModel):
    """How fast the autoscaler acts, each way."""

    scale_up: ScaleUp = Field(default_factory=ScaleUp)
    """Upwards."""
    scale_down: ScaleDown = Field(default_factory=ScaleDown)
    """Downwards."""


class Autoscaling(SpecModel):
    """Scale on saturation: how much of the promise inference alone would use up."""

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                {
                    "rule": "self.minReplicas <= self.maxReplicas",
                    "message": "minReplicas must be at most maxReplicas: lower the one or raise the other",
                    "fieldPath": ".minReplicas",
                }
            ]
        }
    )

    min_replicas: Annotated[int, Field(ge=1, le=MAX_AGENTS)] = 1
    """The fewest agents."""
    max_replicas: Annotated[int, Field(ge=1, le=MAX_AGENTS)]
    """The most agents."""
    target_saturation_percent: Annotated[int, Field(ge=1, le=100)] = 70
    """The saturation that the autoscaler aims at."""
    behavior: ScalingBehavior = Field(default_factory=ScalingBehavior)
    """How fast the autoscaler acts."""


class Finetuning(SpecModel):
    """Whether FinetuneJobs may run on this endpoint."""

    policy: FinetuningPolicy = FinetuningPolicy.ALLOWED
    """Allowed or Disabled. Disabled gives back every job at a checkpoint, and restarts no agent; agents that started
    with it are replaced when it becomes Allowed."""
    max_rank: Rank = 64
    """The largest adapter rank, served or trained."""
    max_concurrent_jobs: ConcurrentJobs = 1
    """FinetuneJobs that an agent runs at once; they share its finetuning time by their priority. Fewer restart no
    agent: jobs of the lowest priority are given back, then the youngest. More than it was started for replace it."""
    max_slowdown_percent: SlowdownPercent | None = None
    """With finetuning an iteration may take so many percent longer than it would without. Unset: as long as the promise
    allows. A change reaches the agents that run, and restarts none."""
    dataset_claims: Annotated[
        tuple[Subdomain, ...], Field(max_length=64, json_schema_extra={"x-kubernetes-list-type": "set"})
    ] = ()
    """The PersistentVolumeClaims that jobs may read data sets from, never that of the artifact store. Default: none."""
    feeder: FeederTemplate = Field(default_factory=FeederTemplate)
    """What the pods need that read jobs' data sets. They get no variable and no volume of `template`."""
    activation_memory: Memory | None = None
    """What each pass of a job may keep for its backward; the rest is computed again, to the same bits. Unset:
    everything is kept."""

    @property
    def jobs(self) -> int:
        """How many jobs an agent may run at once; 0 where finetuning is disabled."""
        return self.max_concurrent_jobs if self.policy is FinetuningPolicy.ALLOWED else 0


class Engine(SpecModel):
    """The engine in each agent: its size, and how it samples."""

    device: Device = Device.AUTO
    """What computes: cpu, cuda (a GPU), or auto: a GPU where the template's resources ask for one or the agent sees
    one, else the CPU. A GPU that is asked for and is not there is an error, never a CPU."""
    dtype: Dtype = Dtype.AUTO
    """Of weights and KV cache: float32, bfloat16, or auto: bfloat16 on a GPU, float32 on a CPU."""
    numerics_mode: NumericsMode = NumericsMode.FAST
    """Exact: an answer has the same bits in any batch, beside finetuning, after a cache hit or a preemption, and so
    have a job's gradients; a GPU is slower, and an agent that cannot keep it does not start. Fast: on a GPU none of it
    is promised; on a CPU in float32 both are the same."""
    kernel_fallback: KernelFallback = KernelFallback.FORBIDDEN
    """Where a GPU's kernels cannot compute (a model with odd heads or heads larger than 256, or widths that do not
    divide by 16; an image without triton): Forbidden, so that an agent does not start and says why, or Allowed, by
    torch's plain operators, which are slower (metric coserve_kernel_fallbacks)."""
    max_requests: Requests | None = None
    """The most requests that run at once; more wait. Unset: by the device, 64 on a CPU, 256 on a GPU of 80 GB or more,
    128 on a smaller one."""
    max_batch_tokens: BatchTokens | None = None
    """The most tokens of one iteration. Unset: by the device, 512 on a CPU, 8192 on a GPU of 80 GB or more, 2048 on a
    smaller one."""
    kv_cache_memory: Memory | None = None
    """Memory of the paged KV cache, of inference and finetuning together. Unset: 256Mi on a CPU; on a GPU what weights
    and everything else leave."""
    threads: Threads = 1
    """CPU threads of the engine."""
    generation_config: GenerationConfig = GenerationConfig.MODEL
    """How to sample where a request does not say: Model takes temperature, top_p, top_k, min_p, repetition_penalty and
    max_new_tokens of the model's generation_config.json, as far as they stand there; Neutral takes none of them
    (temperature 1, nothing cut off). A value in a request always wins."""
    template_variables: TemplateVariables = Field(default_factory=dict)
    """Variables of the chat template by name, such as enable_thinking, where neither the request
    (chat_template_kwargs) nor the adapter has a value. At most 16 KiB of JSON, 32 deep."""
    tool_call_parser: ToolCallParser | None = None
    """How the model's answers write calls of tools: as hermes (Qwen, too), llama3_json or mistral. Unset: as its chat
    template writes them."""


class Rollout(SpecModel):
    """How agents are replaced when what they run changes."""

    max_surge: Annotated[int, Field(ge=0, le=MAX_AGENTS)] = 0
    """Agents that may be there above `replicas` meanwhile. Default 0, since a spare GPU cannot be assumed."""
    max_unavailable: Annotated[int, Field(ge=0, le=MAX_AGENTS)] = 1
    """Agents that may be missing meanwhile. With 0 and maxSurge 1 even a single agent is replaced without a gap."""


class Cors(SpecModel):
    """Which web pages may call the agents from a browser (cross-origin resource sharing)."""

    allow_origins: Annotated[
        tuple[Origin, ...], Field(max_length=32, json_schema_extra={"x-kubernetes-list-type": "set"})
    ] = ()
    """Origins of the pages, such as https://chat.example.com; * allows every page. Default: none, so that browsers
    refuse every page but one that reaches the agents under its own address, through an Ingress for instance."""


class ArtifactStore(SpecModel):
    """Where checkpoints and adapter versions lie; every agent reads and writes it. Immutable."""

    uri: ArtifactsUri
    """pvc://CLAIM/PATH (a read-write-many claim), or file:///artifacts/PATH in the pod."""


def _frozen(field: str, remedy: str) -> JsonValue:
    return {
        "rule": f"self.{field} == oldSelf.{field}",
        "message": f"{field} is immutable: {remedy}",
        "fieldPath": f".{field}",
    }


def _mounts_outside(root: str, uri: str) -> JsonValue:
    """A claim is mounted there; a file URI is served by the template's own volumes."""
    mounts = "self.template.volumeMounts"
    return {
        "rule": f"!self.{uri}.startsWith('pvc://') || !has(self.template) || !has({mounts})"
        f" || {mounts}.all(m, m.mountPath != '{root}' && !m.mountPath.startsWith('{root}/'))",
        "message": f"{root} is where the operator mounts the claim of {uri}: choose another mountPath",
        "fieldPath": ".template.volumeMounts",
    }


class EndpointSpec(SpecModel):
    """What the endpoint should be."""

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                _frozen("model", "create another endpoint for another model"),
                _frozen("artifactStore", "create another endpoint to use another artifact store"),
                {
                    "rule": "self.rollout.maxSurge + self.rollout.maxUnavailable > 0",
                    "message": "maxSurge and maxUnavailable are both 0, so nothing could ever be replaced: raise one",
                    "fieldPath": ".rollout.maxUnavailable",
                },
                _mounts_outside(MODELS_ROOT, "model.uri"),
                _mounts_outside(ARTIFACTS_ROOT, "artifactStore.uri"),
            ]
        }
    )

    model: Model
    """The base model."""
    slo: Slo = Field(default_factory=Slo)
    """The latency promise."""
    replicas: Annotated[int, Field(ge=0, le=MAX_AGENTS)] = 1
    """Number of agents; with `autoscaling` only the start."""
    autoscaling: Autoscaling | None = None
    """Scale on saturation."""
    finetuning: Finetuning = Field(default_factory=Finetuning)
    """Whether FinetuneJobs may run here."""
    adapters: Annotated[
        tuple[AdapterOverride, ...],
        Field(
            max_length=MAX_ADAPTERS,
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
        ),
    ] = ()
    """Names under which something else than the newest published version is served. A name that is not listed is the
    newest; taking its entry out returns to that."""
    engine: Engine = Field(default_factory=Engine)
    """The engine's size, and how it samples."""
    cors: Cors = Field(default_factory=Cors)
    """Which web pages may call the agents."""
    rollout: Rollout = Field(default_factory=Rollout)
    """How agents are replaced when what they run changes."""
    artifact_store: ArtifactStore
    """Where checkpoints and adapter versions lie."""
    image: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    """The agent's image. Default: that of the operator's --agent-image."""
    template: PodTemplate = Field(default_factory=PodTemplate)
    """What the agents' pods need besides."""


class InferenceEndpoint(BaseModel):
    """One base model, served by N agents under a latency promise."""

    model_config = ConfigDict(extra="ignore", frozen=True, alias_generator=to_camel, populate_by_name=True)

    api_version: Literal["coserve.dev/v1alpha1"] = "coserve.dev/v1alpha1"
    kind: Literal["InferenceEndpoint"] = "InferenceEndpoint"
    metadata: ObjectMeta
    spec: EndpointSpec
    status: EndpointStatus = Field(default_factory=EndpointStatus)

    @property
    def model_name(self) -> str:
        """What clients give as `model` for the base model."""
        return self.spec.model.name or self.metadata.name

    def override(self, adapter: str) -> AdapterOverride | None:
        """What the spec says of an adapter's name, if anything."""
        return next((each for each in self.spec.adapters if each.name == adapter), None)

    @classmethod
    def from_dict(cls, body: dict[str, Any]) -> InferenceEndpoint:
        """The object as the API server sent it; pydantic.ValidationError names each bad field."""
        return cls.model_validate(body)
