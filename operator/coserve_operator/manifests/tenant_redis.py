"""The Redis of one tenant, in the operator's namespace: in memory, bounded, and reached from that tenant's namespace.

It may be lost at any time, and is filled again from the custom resources and the artifact store.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

from coserve_api.quantities import quantity_bytes
from coserve_operator.kube import DEPLOYMENT, NETWORK_POLICY, SECRET, SERVICE, SERVICE_ACCOUNT, Kind, Manifest
from coserve_operator.manifests.defaults import with_pod_defaults
from coserve_operator.manifests.metadata import AGENT_APP, APP, FEEDER_APP, MANAGED_BY
from coserve_operator.manifests.pods import CONTAINER_SECURITY, POD_SECURITY
from coserve_operator.settings import TenantRedis
from coserve_operator.tenants import redis_name

REDIS_APP = "coserve-redis"
TENANT = "coserve.dev/tenant"
"""Label: the namespace that it serves."""
CLIENT_APPS = ["coserve-operator", "coserve-metrics-api"]
PORT = 6379
MOST_OF_MEMORY = 0.75
"""maxmemory, as a share of the limit: the rest is for buffers of replies and for fragmentation."""
GRACE_S = 5
"""A frozen script ends by no signal but the last."""
CERTIFICATES = "/tls"
_TLS_FILES = ("tls.crt", "tls.key", "ca.crt")


@dataclass(frozen=True, slots=True)
class TenantRedisParts:
    """What makes one: the tenant, and the password of its administrator; `certificate` is the digest of what the
    Secret with the certificate holds, so that a renewed one is taken.
    """

    system: str
    """The operator's namespace."""
    tenant: str
    settings: TenantRedis
    password: str
    certificate: str = ""

    @property
    def name(self) -> str:
        """Of all its objects but the Secret."""
        return redis_name(self.tenant)

    @property
    def secret_name(self) -> str:
        """Of the Secret with the password: of another one, another."""
        return f"{self.name}-{hashlib.sha256(self.password.encode()).hexdigest()[:10]}"

    @property
    def labels(self) -> dict[str, str]:
        """What selects its pod."""
        return {APP: REDIS_APP, TENANT: self.tenant}

    def manifest(self, kind: Kind, name: str, owner: Manifest, **body: Any) -> Manifest:
        """Return an object that `owner` owns."""
        reference = {
            "apiVersion": DEPLOYMENT.api_version if owner["kind"] == DEPLOYMENT.name else SERVICE_ACCOUNT.api_version,
            "kind": owner["kind"],
            "name": owner["metadata"]["name"],
            "uid": owner["metadata"]["uid"],
            "controller": True,
        }
        metadata = {
            "name": name,
            "namespace": self.system,
            "labels": self.settings.labels | MANAGED_BY | self.labels,
            "ownerReferences": [reference],
        }
        return {"apiVersion": kind.api_version, "kind": kind.name, "metadata": metadata, **body}


def deployment(parts: TenantRedisParts, account: Manifest) -> Manifest:
    """Return the Deployment, which goes with a ServiceAccount of the release, as everything else goes with it."""
    settings = parts.settings
    password = {"name": "REDIS_PASSWORD", "valueFrom": {"secretKeyRef": {"name": parts.secret_name, "key": "password"}}}
    volumes: list[dict[str, Any]] = [{"name": "tmp", "emptyDir": {}}]
    mounts: list[dict[str, Any]] = [{"name": "tmp", "mountPath": "/tmp"}]
    if settings.tls_secret:
        items = [{"key": each, "path": each} for each in _TLS_FILES]
        volumes.append({"name": "tls", "secret": {"secretName": settings.tls_secret, "items": items}})
        mounts.append({"name": "tls", "mountPath": CERTIFICATES, "readOnly": True})
    container = {
        "name": "redis",
        "image": settings.image,
        "imagePullPolicy": settings.image_pull_policy,
        "command": ["sh", "-c"],
        "args": [_start(settings)],
        "env": [password],
        "ports": [{"name": "redis", "containerPort": PORT}],
        "startupProbe": _probe(settings, period_s=2, failures=60),
        "livenessProbe": _probe(settings, period_s=10, failures=3),
        "readinessProbe": _probe(settings, period_s=5, failures=2),
        "resources": settings.resources,
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": mounts,
    }
    pod = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": GRACE_S,
        "securityContext": POD_SECURITY,
        "containers": [container],
        "volumes": volumes,
    }
    annotations = {"coserve.dev/certificate": parts.certificate} if parts.certificate else {}
    made = parts.manifest(
        DEPLOYMENT,
        parts.name,
        account,
        spec={
            "replicas": 1,
            "revisionHistoryLimit": 1,
            "strategy": {"type": "Recreate"},
            "selector": {"matchLabels": parts.labels},
            "template": {
                "metadata": {"labels": settings.labels | parts.labels, "annotations": annotations},
                "spec": pod,
            },
        },
    )
    return with_pod_defaults(made, settings.pod, spread=True)


def beside(parts: TenantRedisParts, owner: Manifest) -> list[Manifest]:
    """Return what the Deployment owns."""
    made = [
        parts.manifest(
            SECRET,
            parts.secret_name,
            owner,
            immutable=True,
            type="Opaque",
            stringData={"password": parts.password},
        ),
        parts.manifest(
            SERVICE,
            parts.name,
            owner,
            spec={
                "type": "ClusterIP",
                "selector": parts.labels,
                "ports": [{"name": "redis", "port": PORT, "targetPort": "redis", "protocol": "TCP"}],
            },
        ),
    ]
    return [*made, _network_policy(parts, owner)] if parts.settings.network_policy else made


def _network_policy(parts: TenantRedisParts, owner: Manifest) -> Manifest:
    clients = {"matchExpressions": [{"key": APP, "operator": "In", "values": CLIENT_APPS}]}
    workers = {"matchExpressions": [{"key": APP, "operator": "In", "values": [AGENT_APP, FEEDER_APP]}]}
    there = {"matchLabels": {"kubernetes.io/metadata.name": parts.tenant}}
    spec = {
        "podSelector": {"matchLabels": parts.labels},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [
            {
                "ports": [{"port": "redis", "protocol": "TCP"}],
                "from": [{"podSelector": clients}, {"namespaceSelector": there, "podSelector": workers}],
            }
        ],
        "egress": [],
    }
    return parts.manifest(NETWORK_POLICY, parts.name, owner, spec=spec)


def _start(settings: TenantRedis) -> str:
    """Return the script. The password comes by a file: arguments can be seen in the list of processes."""
    most = int(quantity_bytes(str(settings.resources["limits"]["memory"])) * MOST_OF_MEMORY)
    lines = [
        "requirepass $REDIS_PASSWORD",
        "dir /tmp",
        'save ""',
        "appendonly no",
        f"maxmemory {most}",
        "maxmemory-policy noeviction",
        f"maxclients {settings.max_clients}",
    ]
    if settings.tls_secret:
        lines += [
            "port 0",
            f"tls-port {PORT}",
            f"tls-cert-file {CERTIFICATES}/tls.crt",
            f"tls-key-file {CERTIFICATES}/tls.key",
            f"tls-ca-cert-file {CERTIFICATES}/ca.crt",
            "tls-auth-clients no",
        ]
    return "\n".join(["umask 077", "cat >/tmp/redis.conf <<END", *lines, "END", "exec redis-server /tmp/redis.conf\n"])


def _probe(settings: TenantRedis, period_s: int, failures: int) -> dict[str, Any]:
    """Return a probe by a command: a server that a script has frozen still takes connections, and answers BUSY."""
    tls = f" --tls --cacert {CERTIFICATES}/ca.crt" if settings.tls_secret else ""
    words = f'REDISCLI_AUTH="$REDIS_PASSWORD" redis-cli{tls} ping | grep -q PONG'
    return {
        "exec": {"command": ["sh", "-c", words]},
        "periodSeconds": period_s,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }
