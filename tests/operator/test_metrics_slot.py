"""The chart as helm installs it, on a real API server with its aggregator and controllers: namespaces can be deleted
whatever becomes of the metrics API, which is registered by a ready server and goes with the release.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from live_operator import eventually

pytestmark = pytest.mark.apiserver

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "coserve"
SYSTEM = "coserve-system"
API_SERVICE = "v1beta2.custom.metrics.k8s.io"
VALUES = {
    "operator": {"workers": 2},
    "agents": {"priorityClassName": "gpu", "tolerations": [{"key": "gpu", "operator": "Exists"}]},
}

EARLIER_ACCESS = """
apiVersion: v1
kind: Secret
metadata:
  name: coserve-access
  annotations: {helm.sh/resource-policy: keep}
data:
  {{- range list "endpoint-key" "metrics-password" "redis-password" }}
  {{ . }}: {{ randAlphaNum 40 | b64enc }}
  {{- end }}
"""


class Release:
    """The chart in a cluster of its own, and its programs as processes with the rights of their ServiceAccounts."""

    def __init__(self, api: Any, servers: Any, folder: Path, redis_server: Any) -> None:
        self.api, self.servers, self.folder, self.redis_server = api, servers, folder, redis_server
        self.port = servers.free_port()
        self.log = folder / "metrics-api.log"

    def helm(self, *words: str) -> str:
        program = Path(self.api.kubectl_program).parent / "helm"
        env = os.environ | {"KUBECONFIG": str(self.api.kubeconfig), "HELM_CACHE_HOME": str(self.folder / "helm")}
        done = subprocess.run([program, *words], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def kubectl(self, *words: str, stdin: str = "") -> str:
        done = self.api.kubectl(*words, stdin=stdin)
        assert done.returncode == 0, done.stderr
        return str(done.stdout)

    def get(self, kind: str, name: str, namespace: str = SYSTEM) -> dict[str, Any] | None:
        done = self.api.kubectl("-n", namespace, "get", kind, name, "-o", "json")
        return json.loads(done.stdout) if done.returncode == 0 else None

    def is_available(self) -> bool:
        conditions = ((self.get("apiservice", API_SERVICE) or {}).get("status") or {}).get("conditions") or []
        return any(each["type"] == "Available" and each["status"] == "True" for each in conditions)

    def install(self, *flags: str) -> None:
        values = self.folder / "values.yaml"
        values.write_text(yaml.safe_dump(VALUES))
        words = ("upgrade", "--install", "coserve", str(CHART), "-n", SYSTEM, "--create-namespace")
        self.helm(*words, "-f", str(values), *flags)

    def install_as_earlier_charts_did(self) -> dict[str, str]:
        """Install a chart that makes coserve-access itself; return what is in it."""
        earlier = self.folder / "earlier"
        (earlier / "templates").mkdir(parents=True)
        (earlier / "Chart.yaml").write_text((CHART / "Chart.yaml").read_text())
        (earlier / "templates" / "access.yaml").write_text(EARLIER_ACCESS)
        self.helm("install", "coserve", str(earlier), "-n", SYSTEM, "--create-namespace")
        data: dict[str, str] = self.get("secret", "coserve-access")["data"]  # type: ignore[index]
        return data

    def _program(self, module: str, account: str, deployment: str, *flags: str) -> subprocess.Popen[bytes]:
        """Start a Deployment's program with its own flags and its account's rights; `flags` are set over them."""
        token = self.kubectl("-n", SYSTEM, "create", "token", account, "--duration=1h").strip()
        config = yaml.safe_load(Path(self.api.kubeconfig).read_text())
        config["users"] = [{"name": "admin", "user": {"token": token}}]
        kubeconfig = self.folder / f"{account}.kubeconfig"
        kubeconfig.write_text(yaml.safe_dump(config))
        container = self.get("deployment", deployment)["spec"]["template"]["spec"]["containers"][0]  # type: ignore[index]
        env = os.environ | {"KUBECONFIG": str(kubeconfig), "COSERVE_NAMESPACE": SYSTEM}
        with (self.folder / f"{account}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", module, *container["args"], *flags], env=env, stdout=log, stderr=log
            )

    @contextmanager
    def operator(self) -> Iterator[subprocess.Popen[bytes]]:
        # the password in the Secret is that of the Redis which the chart would have started
        flags = (f"--redis-url={self.redis_server.url}", "--health-port=0", "--identity=operator-1")
        os.environ["COSERVE_REDIS_PASSWORD"] = self.redis_server.password
        process = self._program("coserve_operator.main", "coserve-operator", "coserve-operator", *flags)
        del os.environ["COSERVE_REDIS_PASSWORD"]
        try:
            yield process
        finally:
            process.terminate()
            process.wait(20)

    def serve(self) -> subprocess.Popen[bytes]:
        """Start a metrics server, with the certificate that the operator made."""
        secret = self.get("secret", "coserve-metrics-api-certificate")
        assert secret is not None
        for key in ("tls.crt", "tls.key", "ca.crt"):
            (self.folder / key).write_bytes(b64decode(secret["data"][key]))
        ports = (f"--port={self.port}", f"--service-port={self.port}", f"--certificates={self.folder}")
        flags = (*ports, "--identity=metrics-1", f"--redis-url={self.redis_server.url}")
        return self._program("coserve_operator.metrics_api", "coserve-metrics-api", "coserve-metrics-api", *flags)

    def lead_the_service_here(self) -> None:
        """The API server reaches the Service on this machine; a pod stands for the server."""
        service = {"spec": {"type": "ExternalName", "externalName": "localhost", "clusterIP": "", "clusterIPs": None}}
        patch = ("patch", "service", "coserve-metrics-api", "--type=merge", "-p", json.dumps(service))
        self.kubectl("-n", SYSTEM, *patch)
        container = {"name": "one", "image": "none"}
        spec = {"containers": [container]}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "metrics-1"}, "spec": spec}
        self.kubectl("-n", SYSTEM, "create", "serviceaccount", "default")
        self.kubectl("-n", SYSTEM, "create", "-f", "-", stdin=json.dumps(pod))

    def be_ready(self) -> None:
        patch = json.dumps({"status": {"conditions": [{"type": "Ready", "status": "True"}]}})
        self.kubectl("-n", SYSTEM, "patch", "pod", "metrics-1", "--subresource=status", "--type=merge", "-p", patch)

    def a_namespace_can_be_deleted(self, name: str) -> None:
        self.kubectl("create", "namespace", name)
        self.kubectl("delete", "namespace", name, "--timeout=90s")


def certificates(folder: Path) -> None:
    """The aggregator's: by this the API server is known to those it asks."""
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")
    for words in (
        ("req", "-x509", *key, "-subj", "/CN=proxy-ca", "-keyout", "proxy-ca.key", "-out", "proxy-ca.crt"),
        ("req", *key, "-subj", "/CN=front-proxy", "-keyout", "proxy.key", "-out", "proxy.csr"),
        ("x509", "-req", "-in", "proxy.csr", "-CA", "proxy-ca.crt", "-CAkey", "proxy-ca.key", "-out", "proxy.crt"),
    ):
        subprocess.run(["openssl", *words], check=True, capture_output=True, cwd=folder)


@pytest.fixture
def release(tmp_path: Path, servers: Any, redis_server: Any) -> Iterator[Release]:
    certificates(tmp_path)
    flags = (
        *("--requestheader-client-ca-file", str(tmp_path / "proxy-ca.crt")),
        *("--requestheader-allowed-names", "front-proxy", "--requestheader-username-headers", "X-Remote-User"),
        *("--requestheader-group-headers", "X-Remote-Group", "--requestheader-extra-headers-prefix", "X-Remote-Extra-"),
        *("--proxy-client-cert-file", str(tmp_path / "proxy.crt")),
        *("--proxy-client-key-file", str(tmp_path / "proxy.key")),
    )
    with servers.kubernetes(tmp_path, *flags) as api:
        controllers = [
            *(str(Path(api.kubectl_program).parent / "kube-controller-manager"), "--kubeconfig", str(api.kubeconfig)),
            *("--controllers", "namespace-controller,garbage-collector-controller"),
            *("--leader-elect=false", "--secure-port", "0", "--authentication-skip-lookup"),
        ]
        with servers.program(controllers, tmp_path / "controllers.log"):
            made = Release(api, servers, tmp_path, redis_server)
            yield made
    for log in ("coserve-operator.log", "coserve-metrics-api.log"):
        if (tmp_path / log).exists():
            print(f"--- {log}\n{(tmp_path / log).read_text()}")


async def test_namespaces_can_be_deleted_whatever_becomes_of_the_metrics_api(release: Release) -> None:
    release.install()
    release.a_namespace_can_be_deleted("no-image-can-be-pulled")
    with release.operator():
        await eventually(lambda: (release.get("lease", "coserve-operator") or {}).get("spec", {}).get("holderIdentity"))
        await eventually(lambda: release.get("secret", "coserve-metrics-api-certificate"))
        release.lead_the_service_here()
        server = release.serve()
        try:
            await eventually(lambda: release.servers.answers(release.port))
            assert release.get("apiservice", API_SERVICE) is None, "its pod is not ready"
            release.be_ready()
            await eventually(release.is_available)
            answer = json.loads(release.kubectl("get", "--raw", "/apis/custom.metrics.k8s.io/v1beta2"))
            assert answer["kind"] == "APIResourceList"
        finally:
            server.terminate()
            server.wait(20)
        await eventually(lambda: not release.is_available(), 60)  # a server that is killed is noticed by and by
        release.a_namespace_can_be_deleted("no-server-is-left")
        assert release.get("apiservice", API_SERVICE) is None
        server = release.serve()
        try:
            await eventually(release.is_available)
            release.helm("uninstall", "coserve", "-n", SYSTEM)
            await eventually(lambda: release.get("apiservice", API_SERVICE) is None)
        finally:
            server.terminate()
            server.wait(20)
    assert release.get("secret", "coserve-access") is not None


async def test_the_chart_gives_the_operator_all_the_rights_it_needs_and_an_upgrade_keeps_the_keys(
    release: Release, make: Any
) -> None:
    for path in sorted((ROOT / "crds").glob("*.yaml")):  # somebody was there with kubectl
        release.kubectl("apply", "--server-side", "-f", str(path))
    before = release.install_as_earlier_charts_did()
    release.install("--take-ownership")
    with release.operator():
        release.kubectl("create", "namespace", "ml")
        body = make.endpoint_body(autoscaling={"maxReplicas": 3})
        metadata = {"name": "tiny", "namespace": "ml"}
        release.kubectl("apply", "-f", "-", stdin=json.dumps(body | {"metadata": metadata}))
        release.kubectl("apply", "-n", "ml", "-f", "-", stdin=json.dumps(job_of(make)))
        agents = await eventually(lambda: release.get("deployment", "tiny", "ml"))
        pod = agents["spec"]["template"]["spec"]
        assert pod["priorityClassName"] == "gpu"
        assert pod["tolerations"] == [{"key": "gpu", "operator": "Exists"}]
        redis = next(each["value"] for each in pod["containers"][0]["env"] if each["name"] == "COSERVE_REDIS_URL")
        assert redis == release.redis_server.url
        tenant = await eventually(lambda: release.get("deployment", "coserve-redis-ml"))
        assert tenant["metadata"]["ownerReferences"][0]["kind"] == "ServiceAccount"
        for kind in ("service", "networkpolicy"):
            await eventually(lambda kind=kind: release.get(kind, "coserve-redis-ml"))
        await eventually(lambda: release.get("hpa", "tiny", "ml"))
        feeder = await eventually(lambda: release.get("job", "job-1-feeder", "ml"))
        assert feeder["spec"]["template"]["spec"]["priorityClassName"] == "gpu"

        release.kubectl("apply", "-f", "-", stdin=json.dumps(ADAPTER))

        def told() -> Any:
            conditions = (release.get("iep", "tiny", "ml") or {}).get("status", {}).get("conditions") or []
            found = next((each for each in conditions if each["type"] == "ScalingReady"), {})
            return found if found.get("reason") == "MetricsApiTaken" else None

        condition = await eventually(told)
        assert condition["status"] == "False"
        assert "monitoring/prometheus-adapter" in condition["message"]
        assert "docs/autoscaling.md" in condition["message"]
        assert await eventually(lambda: release.get("hpa", "tiny", "ml") is None)
        release.kubectl("delete", "apiservice", ADAPTER["metadata"]["name"])
        await eventually(lambda: release.get("hpa", "tiny", "ml"))
    assert "cannot" not in (release.folder / "coserve-operator.log").read_text(), "no right is missing"
    assert release.get("secret", "coserve-access")["data"] == before  # type: ignore[index]
    release.helm("uninstall", "coserve", "-n", SYSTEM)
    assert release.get("iep", "tiny", "ml"), "definitions and objects stay"
    for kind in ("deployment", "service", "networkpolicy"):
        await eventually(lambda kind=kind: release.get(kind, "coserve-redis-ml") is None, 60)
    release.helm("install", "coserve", str(CHART), "-n", "elsewhere", "--create-namespace", "--take-ownership")
    rendered = release.helm(
        "template", "coserve", str(CHART), "-n", "elsewhere", "--skip-tests", "--kube-version=1.34.0"
    )
    release.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=rendered)


ADAPTER = {
    "apiVersion": "apiregistration.k8s.io/v1",
    "kind": "APIService",
    "metadata": {"name": "v1beta1.custom.metrics.k8s.io"},
    "spec": {
        "group": "custom.metrics.k8s.io",
        "version": "v1beta1",
        "groupPriorityMinimum": 100,
        "versionPriority": 100,
        "insecureSkipTLSVerify": True,
        "service": {"namespace": "monitoring", "name": "prometheus-adapter", "port": 443},
    },
}


def job_of(make: Any) -> dict[str, Any]:
    body: dict[str, Any] = make.job_body()
    return body | {"metadata": {"name": "job-1"}}
