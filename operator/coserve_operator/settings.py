"""The one place where configuration is read: COSERVE_ variables, or flags of the same names."""

import socket
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator
from pydantic.alias_generators import to_camel
from pydantic_settings import BaseSettings, SettingsConfigDict


class PodDefaults(BaseModel):
    """What agents' and feeders' pods get where their endpoint's template says nothing else: fields of a pod."""

    model_config = ConfigDict(alias_generator=to_camel, extra="forbid", frozen=True)

    image_pull_secrets: tuple[dict[str, str], ...] = ()
    """Secrets of the pod's own namespace."""
    priority_class_name: str = ""
    runtime_class_name: str = ""
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    node_selector: dict[str, str] = {}
    tolerations: tuple[dict[str, Any], ...] = ()
    affinity: dict[str, Any] = {}
    topology_spread_constraints: tuple[dict[str, Any], ...] = ()
    """Of agents, in the place of our own; one without labelSelector means the agents of the endpoint."""


NO_DEFAULTS = PodDefaults()


class TenantRedis(BaseModel):
    """How the operator runs the Redis of each namespace, in its own."""

    model_config = ConfigDict(alias_generator=to_camel, extra="forbid", frozen=True)

    image: str
    """With sh, redis-server >= 7.0 and redis-cli."""
    image_pull_policy: str = "IfNotPresent"
    max_clients: int = Field(default=1000, ge=10)
    resources: dict[str, dict[str, str | int | float]]
    labels: dict[str, str] = {}
    """Of every object."""
    pod: PodDefaults = NO_DEFAULTS
    network_policy: bool = True
    """Whether to keep everybody else out."""
    tls_secret: str = ""
    """Secret with tls.crt, tls.key and ca.crt; empty: no TLS."""

    @field_validator("resources")
    @classmethod
    def _bounded(cls, resources: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        if not resources.get("limits", {}).get("memory"):
            raise ValueError("limits.memory is missing: three quarters of it are Redis' maxmemory; set it")
        return resources


class RedisSettings(BaseSettings):
    """How a program of the operator's namespace reaches Redis."""

    model_config = SettingsConfigDict(env_prefix="COSERVE_", cli_parse_args=False, cli_kebab_case=True)

    redis_url: str = "redis://127.0.0.1:6379/0"
    """{redis} stands for the name of a namespace's own Redis, whose passwords derive from `redis_password`."""
    redis_username: str | None = None
    redis_password: SecretStr | None = None
    redis_tls: Path | None = None
    """Folder of ca.crt, which verifies Redis' certificate, and of tls.crt where Redis is ours."""

    @property
    def password(self) -> str | None:
        """The password in clear."""
        return None if self.redis_password is None else self.redis_password.get_secret_value()


class Settings(RedisSettings):
    """The operator's configuration."""

    model_config = SettingsConfigDict(env_prefix="COSERVE_", cli_parse_args=False, cli_kebab_case=True)

    agent_image: str = "coserve-agent:dev"
    """Image of agents and feeders whose endpoint names none."""
    pod_defaults: PodDefaults = NO_DEFAULTS
    """Of agents and feeders."""
    agent_redis_url: str = ""
    """Redis as pods of other namespaces see it; default: `redis_url`."""
    access_secret: str = ""
    """Secret of the operator's namespace with the keys, made where there is none; empty: they come by variables."""
    endpoint_key: SecretStr = SecretStr("")
    """Secret from which the endpoints' Redis passwords are derived."""
    endpoint_key_previous: SecretStr = SecretStr("")
    """The one before: its passwords are taken, too, until all pods have those of the new one."""
    shared_user: bool = False
    """Endpoints have the operator's own Redis user, where others cannot be made."""
    tenant_redis: TenantRedis | None = None
    """How the Redis of a namespace is run; without it somebody else runs it."""
    owner: str = "coserve-operator"
    """ServiceAccount of the operator's namespace that the tenants' Redis go with."""
    metrics_password: SecretStr = SecretStr("")
    """Password of the metrics API's Redis user; empty: there is no such user."""
    metrics_api_service: str = "coserve-metrics-api"
    """Service of the metrics API in the operator's namespace; empty: there is none, and no autoscaler is made."""
    metrics_api_certificate: str = ""
    """Secret with the metrics API's certificate, made and renewed here; empty: somebody else does it."""
    namespace: str = "default"
    """Where the operator and its Lease are."""
    identity: str = Field(default_factory=socket.gethostname)
    """Of this replica in the Lease."""
    lease: str = "coserve-operator"
    """Name of the Lease."""
    workers: int = Field(default=8, ge=1, le=64)
    """Groups reconciled at once."""
    rollout_max_endpoints: int = Field(default=10, ge=1)
    """Endpoints whose agents are replaced at once for a new version of the operator or another default image."""
    poll_seconds: float = Field(default=0.5, gt=0)
    """How often Redis is asked what has changed."""
    full_poll_seconds: float = Field(default=10.0, gt=0)
    """After how long an endpoint is read that says of no change, as an agent of the version before does not."""
    resync_seconds: float = Field(default=300.0, gt=0)
    """How often everything is listed and reconciled anyway, give or take a fifth."""
    checks: int = Field(default=8, ge=1)
    """Data sets of waiting jobs that are checked at once."""
    endpoint_checks: int = Field(default=2, ge=1)
    """Those of one endpoint among them."""
    health_port: int = Field(default=8080, ge=0, le=65535)
    """Port of /healthz, /readyz and /metrics."""
    log_level: str = "INFO"

    @property
    def redis_url_of_agents(self) -> str:
        """Redis as agents reach it."""
        return self.agent_redis_url or self.redis_url


class MetricsApiSettings(RedisSettings):
    """The metrics API's configuration."""

    model_config = SettingsConfigDict(env_prefix="COSERVE_", cli_parse_args=False, cli_kebab_case=True)

    port: int = Field(default=8443, ge=0, le=65535)
    certificates: Path = Path("/tls")
    """Folder of tls.crt, tls.key and ca.crt, which the API server verifies the certificate with."""
    namespace: str = "default"
    """Where this server is."""
    identity: str = Field(default_factory=socket.gethostname)
    """Of this server's pod."""
    service: str = "coserve-metrics-api"
    """Service in front of the servers."""
    service_port: int = Field(default=443, ge=1, le=65535)
    owner: str = "coserve-metrics-api"
    """ClusterRole that the APIService goes with."""
    log_level: str = "INFO"
