"""The one place where configuration is read: COSERVE_ variables, or flags of the same names."""

import socket
from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class RedisSettings(BaseSettings):
    """How a program of the operator's namespace reaches Redis."""

    model_config = SettingsConfigDict(env_prefix="COSERVE_", cli_parse_args=False, cli_kebab_case=True)

    redis_url: str = "redis://127.0.0.1:6379/0"
    redis_username: str | None = None
    redis_password: SecretStr | None = None

    @property
    def password(self) -> str | None:
        """The password in clear."""
        return None if self.redis_password is None else self.redis_password.get_secret_value()


class Settings(RedisSettings):
    """The operator's configuration."""

    model_config = SettingsConfigDict(env_prefix="COSERVE_", cli_parse_args=False, cli_kebab_case=True)

    agent_image: str = "coserve-agent:dev"
    """Image of agents and feeders whose endpoint names none."""
    agent_redis_url: str = ""
    """Redis as pods of other namespaces see it; default: `redis_url`."""
    endpoint_key: SecretStr = SecretStr("")
    """Secret from which the endpoints' Redis passwords are derived."""
    metrics_password: SecretStr = SecretStr("")
    """Password of the metrics API's Redis user; empty: there is no such user."""
    namespace: str = "default"
    """Where the operator and its Lease are."""
    identity: str = Field(default_factory=socket.gethostname)
    """Of this replica in the Lease."""
    lease: str = "coserve-operator"
    """Name of the Lease."""
    workers: int = Field(default=8, ge=1, le=64)
    """Groups reconciled at once."""
    poll_seconds: float = Field(default=1.0, gt=0)
    """How often heartbeats are looked at."""
    resync_seconds: float = Field(default=300.0, gt=0)
    """How often everything is listed and reconciled anyway, give or take a fifth."""
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
    certificate: Path = Path("/tls/tls.crt")
    certificate_key: Path = Path("/tls/tls.key")
    log_level: str = "INFO"
