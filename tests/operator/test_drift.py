"""What others do to the objects of an endpoint: taken back at once, and from somebody who insists ever more rarely."""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from live_operator import Cluster, Operator, eventually

from coserve_operator.apply.drift import CALM_S, FIRST_WAIT_S, LONGEST_WAIT_S, OFTEN, Drifts
from coserve_operator.apply.ownership import owned_fields, taken_by

OURS = {"manager": "coserve-operator", "operation": "Apply"}
IMAGE = {"f:spec": {"f:template": {"f:spec": {"f:containers": {'k:{"name":"agent"}': {".": {}, "f:image": {}}}}}}}
IMAGE_PATH = "spec.template.spec.containers[name=agent].image"


def body(*entries: Any) -> dict[str, Any]:
    return {"metadata": {"managedFields": list(entries)}}


def test_ours_is_what_server_side_apply_says_is_ours() -> None:
    status = OURS | {"subresource": "status", "fieldsV1": {"f:status": {"f:replicas": {}}}}
    labels = {"f:metadata": {"f:labels": {"f:a": {}}, "f:finalizers": {'v:"x"': {}}}}
    theirs = {"manager": "kubectl-edit", "operation": "Update", "fieldsV1": {"f:spec": {"f:replicas": {}}}}
    found = body(OURS | {"fieldsV1": IMAGE | labels}, theirs, status)
    assert owned_fields(found) == {IMAGE_PATH, "metadata.labels.a", 'metadata.finalizers["x"]'}
    assert owned_fields(body(theirs)) == set()
    assert taken_by(found, frozenset({"spec.replicas"})) == "kubectl-edit"
    assert taken_by(found, frozenset({"spec.gone"})) == "somebody"


def test_who_insists_is_answered_ever_more_rarely_until_it_was_calm() -> None:
    clock = [0.0]
    drifts, lost = Drifts(lambda: clock[0]), frozenset({IMAGE_PATH})
    for _ in range(OFTEN - 1):
        drifts.note("e-1", "Deployment tiny", lost, "argocd")
        assert drifts.wait_s("e-1", "Deployment tiny") == 0.0
        assert drifts.insisted("e-1") == ()
    waits = []
    for _ in range(7):
        drifts.note("e-1", "Deployment tiny", lost, "argocd")
        waits.append(drifts.wait_s("e-1", "Deployment tiny"))
        clock[0] += waits[-1]
    assert waits == [FIRST_WAIT_S * 2**n for n in range(5)] + [LONGEST_WAIT_S] * 2
    (drift,) = drifts.insisted("e-1")
    assert (drift.what, drift.path, drift.manager, drift.times) == ("Deployment tiny", IMAGE_PATH, "argocd", 9)
    assert drifts.insisted("e-2") == ()
    clock[0] += CALM_S
    assert drifts.insisted("e-1") == ()
    drifts.note("e-1", "Deployment tiny", lost, "argocd")
    assert drifts.wait_s("e-1", "Deployment tiny") == 0.0


def test_different_fields_are_no_insisting() -> None:
    drifts = Drifts(lambda: 0.0)
    for number in range(5):
        drifts.note("e-1", "Deployment tiny", frozenset({f"metadata.labels.{number}"}), "kubectl-label")
        assert drifts.wait_s("e-1", "Deployment tiny") == 0.0


# ---- on a real API server ----


def image(cluster: Cluster) -> str:
    return str((cluster.get("deployment", "tiny") or {})["spec"]["template"]["spec"]["containers"][0]["image"])


def patch(cluster: Cluster, kind: str, change: Any, manager: str = "meddler") -> None:
    cluster.kubectl("patch", kind, "tiny", f"--field-manager={manager}", "--type=strategic", "-p", json.dumps(change))


def with_image(name: str) -> Any:
    return {"spec": {"template": {"spec": {"containers": [{"name": "agent", "image": name}]}}}}


async def writes(cluster: Cluster, seconds: float) -> int:
    """How many versions of the Deployment there are in this time, after the first."""
    words = ["-n", cluster.namespace, "get", "deployment", "tiny", "-w", "-o", "jsonpath={.metadata.resourceVersion} "]
    program = [str(cluster.api.kubectl_program), "--kubeconfig", str(cluster.api.kubeconfig), *words]
    watch = await asyncio.create_subprocess_exec(*program, stdout=asyncio.subprocess.PIPE)
    await asyncio.sleep(seconds)
    watch.terminate()
    seen, _ = await watch.communicate()
    return len(set(seen.split())) - 1


@pytest.mark.apiserver
async def test_foreign_changes_are_taken_back_at_once_and_before_a_restart(
    served: Any, cluster: Cluster, operator: Operator, make: Any
) -> None:
    await eventually(lambda: cluster.get("deployment", "tiny"))
    await eventually(lambda: cluster.condition("iep", "tiny", "Ready")["status"] == "False")
    patch(cluster, "deployment", with_image("evil:latest"))
    patch(cluster, "service", {"spec": {"selector": {"app.kubernetes.io/name": "nothing"}}})
    opened = {"spec": {"ingress": [{}]}}
    cluster.kubectl("patch", "networkpolicy", "tiny", "--type=merge", "-p", json.dumps(opened))
    cluster.kubectl("delete", "serviceaccount", "tiny-agent")
    await eventually(lambda: image(cluster) == "agent:test")
    selector = {"app.kubernetes.io/name": "coserve-agent", "coserve.dev/endpoint": "tiny"}
    await eventually(lambda: (cluster.get("service", "tiny") or {})["spec"]["selector"] == selector)
    await eventually(lambda: (cluster.get("networkpolicy", "tiny") or {})["spec"]["ingress"] != [{}])
    await eventually(lambda: cluster.get("serviceaccount", "tiny-agent"))
    assert cluster.condition("iep", "tiny", "Drifted")["status"] == "absent"
    operator.end()
    patch(cluster, "deployment", with_image("evil:latest"))
    operator.start()
    await eventually(lambda: image(cluster) == "agent:test")


@pytest.mark.apiserver
async def test_who_insists_is_named_and_not_fought(served: Any, cluster: Cluster) -> None:
    await eventually(lambda: cluster.get("deployment", "tiny"))
    for number in range(OFTEN):
        await eventually(lambda: image(cluster) == "agent:test")
        patch(cluster, "deployment", with_image(f"evil:{number}"), "another-controller")
    drifted = await eventually(
        lambda: (found := cluster.condition("iep", "tiny", "Drifted"))["status"] == "True" and found
    )
    assert drifted["reason"] == "ChangedByOthers"
    assert f"{IMAGE_PATH} of Deployment tiny was changed by another-controller 3 times" in drifted["message"]
    await asyncio.sleep(2)
    assert image(cluster) == f"evil:{OFTEN - 1}"


@pytest.mark.apiserver
async def test_a_restart_that_a_user_asked_for_stands(served: Any, cluster: Cluster) -> None:
    await eventually(lambda: cluster.get("deployment", "tiny"))
    cluster.kubectl("rollout", "restart", "deployment", "tiny")
    assert await writes(cluster, 3) == 0
    template = (cluster.get("deployment", "tiny") or {})["spec"]["template"]
    assert "kubectl.kubernetes.io/restartedAt" in template["metadata"]["annotations"]


@pytest.fixture
async def mutate(cluster: Cluster, tmp_path: Path) -> AsyncIterator[Callable[[Any], Any]]:
    """A mutating webhook that makes its JSON patch of every Deployment of the namespace that is written."""
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    words = f"openssl req -x509 -newkey rsa:2048 -batch -nodes -days 2 -keyout {key} -out {certificate}"
    subject = ["-subj", "/CN=webhook", "-addext", "subjectAltName=IP:127.0.0.1"]
    made = await asyncio.create_subprocess_exec(*words.split(), *subject, stderr=asyncio.subprocess.DEVNULL)
    assert await made.wait() == 0
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    changes: list[Any] = []

    async def review(request: web.Request) -> web.Response:
        asked = await request.json()
        names = [each["name"] for each in asked["request"]["object"]["spec"]["template"]["spec"]["containers"]]
        missing = [each for each in changes if each is not SIDECAR or "proxy" not in names]
        encoded = base64.b64encode(json.dumps(missing).encode()).decode()
        answer = {"uid": asked["request"]["uid"], "allowed": True, "patchType": "JSONPatch", "patch": encoded}
        return web.json_response({"apiVersion": asked["apiVersion"], "kind": asked["kind"], "response": answer})

    application = web.Application()
    application.router.add_post("/", review)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    rule = {"apiGroups": ["apps"], "apiVersions": ["v1"], "operations": ["CREATE", "UPDATE"]}
    name = f"mutate-{cluster.namespace}"
    ca = base64.b64encode(certificate.read_bytes()).decode()
    hook = {
        "name": "mutate.example.com",
        "clientConfig": {"url": f"https://127.0.0.1:{runner.addresses[0][1]}/", "caBundle": ca},
        "rules": [rule | {"resources": ["deployments"]}],
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": cluster.namespace}},
        "sideEffects": "None",
        "admissionReviewVersions": ["v1"],
        "reinvocationPolicy": "IfNeeded",
    }
    kind = {"apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingWebhookConfiguration"}

    async def begin(patch: Any) -> None:
        changes[:] = patch
        manifest = json.dumps(kind | {"metadata": {"name": name}, "webhooks": [hook]})
        await asyncio.to_thread(cluster.kubectl, "apply", "-f", "-", stdin=manifest)
        await asyncio.sleep(1.5)  # the API server reads its configuration now and then

    yield begin
    await asyncio.to_thread(cluster.kubectl, "delete", "mutatingwebhookconfiguration", name, "--ignore-not-found")
    await runner.cleanup()


POLICY = {"op": "add", "path": "/spec/template/spec/containers/0/imagePullPolicy", "value": "Always"}
MIRRORED = {"op": "replace", "path": "/spec/template/spec/containers/0/image", "value": "mirror/agent:test"}
SIDECAR = {"op": "add", "path": "/spec/template/spec/containers/1", "value": {"name": "proxy", "image": "proxy:1"}}


@pytest.mark.apiserver
@pytest.mark.parametrize("change", [[POLICY, MIRRORED], [SIDECAR]], ids=["our fields", "a sidecar"])
async def test_what_a_webhook_writes_into_our_request_is_no_drift(
    change: Any, cluster: Cluster, mutate: Any, operator: Operator, make: Any
) -> None:
    await mutate(change)
    cluster.apply(make.endpoint_body())
    await eventually(lambda: cluster.get("deployment", "tiny"))
    cluster.apply(make.endpoint_body(), engine={"threads": 2})  # a change of ours, over what the webhook wrote
    threads = {"name": "COSERVE_THREADS", "value": "2"}

    def changed() -> bool:
        containers = (cluster.get("deployment", "tiny") or {})["spec"]["template"]["spec"]["containers"]
        return threads in containers[0]["env"]

    await eventually(changed)
    assert await writes(cluster, 4) <= 1
    containers = (cluster.get("deployment", "tiny") or {})["spec"]["template"]["spec"]["containers"]
    assert len(containers) == (2 if change == [SIDECAR] else 1)
    assert containers[0]["image"] == ("agent:test" if change == [SIDECAR] else "mirror/agent:test")
    assert cluster.condition("iep", "tiny", "Drifted")["status"] == "absent"
