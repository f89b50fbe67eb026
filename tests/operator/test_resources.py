"""What endpoints and jobs own: by its shape, and as a real API server with Pod Security "restricted" takes it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from coserve_api.endpoint import InferenceEndpoint
from coserve_api.job import FinetuneJob
from coserve_operator.manifests import agents, feeder
from coserve_operator.manifests import endpoint as owned
from coserve_operator.manifests.metadata import is_owned_by, selector, short_name
from coserve_operator.tenants import RedisAccess

REDIS = RedisAccess("redis://coserve-redis-ml.coserve-system.svc:6379/0", "cs-e-1", "password", digest="0123456789")
TEMPLATE = {
    "resources": {"requests": {"cpu": "2", "memory": "8Gi"}, "limits": {"memory": "8Gi", "nvidia.com/gpu": "1"}},
    "nodeSelector": {"gpu": "h200"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "env": [{"name": "HF_HUB_OFFLINE", "value": "1"},
        {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}],
    "volumes": [
        {"name": "scratch", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}},
        {"name": "packages", "persistentVolumeClaim": {"claimName": "packages", "readOnly": True}},
    ],
    "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"},
        {"name": "packages", "mountPath": "/packages", "readOnly": True}],
}  # fmt: skip


def everything(make, **spec):
    endpoint = make.endpoint(**spec)
    autoscaler = owned.autoscaler(endpoint)
    return [
        owned.service_account(endpoint),
        owned.redis_secret(endpoint, REDIS),
        owned.service(endpoint),
        owned.disruption_budget(endpoint),
        owned.network_policy(endpoint, "coserve-system", REDIS.url),
        agents.deployment(endpoint, 2, "agent:1", REDIS),
        feeder.feeder(make.job(), endpoint, "agent:1", REDIS),
        *([] if autoscaler is None else [autoscaler]),
    ]


def pod_of(manifest):
    return manifest["spec"]["template"]["spec"]


def env_of(manifest):
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in pod_of(manifest)["containers"][0]["env"]}


def test_a_roll_out_needs_no_spare_gpu_and_a_pod_has_time_to_drain(make) -> None:
    deployment = agents.deployment(make.endpoint(), 2, "agent:1", REDIS)
    assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    pod = pod_of(deployment)
    assert pod["terminationGracePeriodSeconds"] == 60
    assert pod["containers"][0]["lifecycle"] == {"preStop": {"sleep": {"seconds": 3}}}
    assert pod["automountServiceAccountToken"] is False
    probes = pod["containers"][0]
    assert {probes[name]["httpGet"]["port"] for name in ("startupProbe", "livenessProbe", "readinessProbe")} == {
        "admin"
    }


def test_an_agent_learns_all_it_needs_from_its_environment(make) -> None:
    spec = {"slo": {"timeToFirstToken": "1m30s", "timePerOutputToken": "50ms"}, "engine": {"kvCacheMemory": "2Gi"}}
    spec["engine"] |= {"device": "cuda", "dtype": "bfloat16", "numericsMode": "Exact"}
    spec["engine"] |= {"maxRequests": 32, "maxBatchTokens": 512}
    spec["engine"] |= {"kernelFallback": "Allowed", "toolCallParser": "mistral"}
    spec |= {"finetuning": {"activationMemory": "64Mi"}}
    spec["cors"] = {"allowOrigins": ["https://chat.example.com", "http://localhost:3000"]}
    env = env_of(agents.deployment(make.endpoint(**spec), 1, "agent:1", REDIS))
    expected = {
        "COSERVE_ENDPOINT_UID": "e-1", "COSERVE_ENDPOINT_NAME": "tiny", "COSERVE_NAMESPACE": "ml",
        "COSERVE_MODEL_PATH": "/models/models/tiny", "COSERVE_MODEL_NAME": "tiny", "COSERVE_MAX_MODEL_LENGTH": "1024",
        "COSERVE_TTFT_MS": "90000", "COSERVE_TPOT_MS": "50", "COSERVE_FINETUNING": "Allowed", "COSERVE_MAX_RANK": "64",
        "COSERVE_SLO_PERCENTILE": "99",
        "COSERVE_PASS_BYTES": str(64 * 2**20),
        "COSERVE_DEVICE": "cuda", "COSERVE_DTYPE": "bfloat16", "COSERVE_MAX_REQUESTS": "32",
        "COSERVE_GPU_RESOURCE": "", "COSERVE_NUMERICS_MODE": "Exact", "COSERVE_KERNEL_FALLBACK": "Allowed",
        "COSERVE_MAX_BATCH_TOKENS": "512", "COSERVE_KV_CACHE_BYTES": str(2 * 2**30),
        "COSERVE_THREADS": "1",
        "COSERVE_ARTIFACTS": "/artifacts/store", "COSERVE_REDIS_URL": REDIS.url,
        "COSERVE_HTTP_PORT": "8000", "COSERVE_ADMIN_PORT": "8001", "COSERVE_GENERATION_CONFIG": "Model",
        "COSERVE_TOOL_CALL_PARSER": "mistral",
        "COSERVE_CORS_ORIGINS": "https://chat.example.com,http://localhost:3000",
    }  # fmt: skip
    assert expected.items() <= env.items()
    unset = env_of(agents.deployment(make.endpoint(), 1, "agent:1", REDIS))
    assert {unset[f"COSERVE_{name}"] for name in ("PASS_BYTES", "CORS_ORIGINS")} == {""}
    assert (unset["COSERVE_DEVICE"], unset["COSERVE_DTYPE"]) == ("auto", "auto")
    assert unset["COSERVE_NUMERICS_MODE"] == "Fast"
    assert unset["COSERVE_KERNEL_FALLBACK"] == "Forbidden"
    optional = {
        "COSERVE_MAX_REQUESTS",
        "COSERVE_MAX_BATCH_TOKENS",
        "COSERVE_KV_CACHE_BYTES",
        "COSERVE_TOOL_CALL_PARSER",
    }
    assert not optional & unset.keys(), "an agent's image from before takes no blank"
    assert env["COSERVE_POD_UID"] == {"fieldRef": {"fieldPath": "metadata.uid"}}
    assert env["COSERVE_REDIS_PASSWORD"] == {"secretKeyRef": {"name": "tiny-redis-0123456789", "key": "password"}}


@pytest.mark.parametrize(
    ("resources", "asked"),
    [
        ({"limits": {"nvidia.com/gpu": 1}}, "nvidia.com/gpu"),
        ({"limits": {"cpu": "4", "nvidia.com/mig-1g.18gb": "1"}}, "nvidia.com/mig-1g.18gb"),
        ({"requests": {"amd.com/gpu": "1"}, "limits": {"amd.com/gpu": "1"}}, "amd.com/gpu"),
        ({"requests": {"nvidia.com/gpu.shared": "2"}}, "nvidia.com/gpu.shared"),
        ({"limits": {"nvidia.com/gpu": 0}}, ""),
        ({"limits": {"nvidia.com/gpu": "0"}, "requests": {"cpu": "10"}}, ""),
        ({"limits": {"example.com/nvidia.com": "1", "hugepages-2Mi": "1Gi"}}, ""),
        ({}, ""),
    ],
)
def test_an_agent_is_told_by_which_resource_its_pod_gets_a_gpu(make, resources, asked) -> None:
    deployment = agents.deployment(make.endpoint(template={"resources": resources}), 1, "agent:1", REDIS)
    assert env_of(deployment)["COSERVE_GPU_RESOURCE"] == asked


def test_model_and_data_are_read_only_and_the_artifact_store_is_not(make) -> None:
    endpoint = make.endpoint()
    mounts = {
        each["mountPath"]: each
        for each in pod_of(agents.deployment(endpoint, 1, "a", REDIS))["containers"][0]["volumeMounts"]
    }
    assert mounts["/models/models"]["readOnly"] is True
    assert mounts["/artifacts"]["readOnly"] is False
    mounts = {
        each["mountPath"]: each
        for each in pod_of(feeder.feeder(make.job(), endpoint, "a", REDIS))["containers"][0]["volumeMounts"]
    }
    assert mounts["/data/data"]["readOnly"] is True
    assert "/artifacts" not in mounts


def test_a_claim_with_two_uses_is_one_volume(make) -> None:
    endpoint = make.endpoint(model={"uri": "pvc://all/model"}, artifactStore={"uri": "pvc://all/artifacts"})
    pod = pod_of(agents.deployment(endpoint, 1, "agent:1", REDIS))
    claims = [each["persistentVolumeClaim"] for each in pod["volumes"] if "persistentVolumeClaim" in each]
    assert claims == [{"claimName": "all", "readOnly": False}]
    assert [each["mountPath"] for each in pod["containers"][0]["volumeMounts"]] == ["/tmp", "/models/all", "/artifacts"]


def test_file_uris_need_no_volume_of_ours(make) -> None:
    endpoint = make.endpoint(model={"uri": "file:///models/x"}, artifactStore={"uri": "file:///artifacts"})
    pod = pod_of(agents.deployment(endpoint, 1, "agent:1", REDIS))
    assert [each["name"] for each in pod["volumes"]] == ["coserve-tmp"]


def test_the_feeder_takes_the_templates_place_and_nothing_else_of_it(make) -> None:
    """It parses what a job's author chose; a Secret that the agents mount is none of its business."""
    pod = pod_of(feeder.feeder(make.job(), make.endpoint(template=TEMPLATE), "agent:1", REDIS))
    plain = pod_of(feeder.feeder(make.job(), make.endpoint(), "agent:1", REDIS))
    assert pod["nodeSelector"] == {"gpu": "h200"}
    assert pod["containers"][0]["resources"] == feeder.RESOURCES
    assert (pod["volumes"], pod["containers"]) == (plain["volumes"], plain["containers"])


def test_the_feeder_gets_what_the_endpoint_gives_to_feeders(make) -> None:
    own = {name: TEMPLATE[name] for name in ("env", "volumes", "volumeMounts")}
    container = pod_of(feeder.feeder(make.job(), make.endpoint(finetuning={"feeder": own}), "a", REDIS))["containers"][
        0
    ]
    assert {"name": "packages", "mountPath": "/packages", "readOnly": True} in container["volumeMounts"]
    agent = pod_of(agents.deployment(make.endpoint(finetuning={"feeder": own}), 1, "a", REDIS))["containers"][0]
    assert "packages" not in [each["name"] for each in agent["volumeMounts"]]


def test_the_feeder_reads_a_model_that_the_template_mounts(make) -> None:
    template = {
        "volumes": [
            {"name": "weights", "persistentVolumeClaim": {"claimName": "w"}},
            {"name": "key", "secret": {"secretName": "k"}},
        ],
        "volumeMounts": [{"name": "weights", "mountPath": "/models/big"}, {"name": "key", "mountPath": "/key"}],
    }
    endpoint = make.endpoint(model={"uri": "file:///models/big/llama"}, template=template)
    pod = pod_of(feeder.feeder(make.job(), endpoint, "a", REDIS))
    mounts = [(each["mountPath"], each.get("readOnly")) for each in pod["containers"][0]["volumeMounts"]]
    assert mounts == [("/tmp", None), ("/data/data", True), ("/models/big", True)]
    assert [each["name"] for each in pod["volumes"]][-1] == "weights"
    template["volumeMounts"][0]["mountPath"] = "/models/bigger"
    pod = pod_of(
        feeder.feeder(
            make.job(),
            make.endpoint(model=endpoint.spec.model.model_dump(by_alias=True), template=template),
            "a",
            REDIS,
        )
    )
    assert "weights" not in [each["name"] for each in pod["volumes"]]


def test_the_feeder_is_told_the_whole_data_set_and_nothing_of_the_adapter(make) -> None:
    training = {"maxSteps": 7, "batchSize": 4, "seed": 3, "warmupSteps": 2}
    dataset = {"uri": "file:///data/x.jsonl", "format": "text", "evalPercent": 9, "onInvalid": "Skip", "learn": "Last"}
    job = make.job(dataset=dataset, training=training)
    env = env_of(feeder.feeder(job, make.endpoint(), "agent:1", REDIS))
    expected = {
        "COSERVE_ENDPOINT_UID": "e-1", "COSERVE_JOB_UID": "j-1", "COSERVE_JOB_NAME": "job-1",
        "COSERVE_DATASET_PATH": "/data/x.jsonl", "COSERVE_MODEL_PATH": "/models/models/tiny", "COSERVE_FORMAT": "text",
        "COSERVE_EVAL_PERCENT": "9", "COSERVE_MAX_SEQUENCE_LENGTH": "1024", "COSERVE_ON_INVALID": "Skip",
        "COSERVE_BATCH_SIZE": "4", "COSERVE_MAX_STEPS": "7", "COSERVE_SEED": "3", "COSERVE_WARMUP_STEPS": "2",
        "COSERVE_LEARN": "Last", "COSERVE_DATASET_ROOT": "/data",
    }  # fmt: skip
    assert expected.items() <= env.items()
    assert "COSERVE_EPOCHS" not in env
    assert env_of(feeder.feeder(make.job(), make.endpoint(), "a", REDIS))["COSERVE_DATASET_ROOT"] == "/data/data"
    same = make.job(dataset=dataset, training=training | {"learningRate": "1e-5"})
    assert feeder.inputs_digest(same, make.endpoint()) == feeder.inputs_digest(job, make.endpoint())
    assert feeder.inputs_digest(make.job(), make.endpoint()) != feeder.inputs_digest(job, make.endpoint())


def test_the_feeder_gets_a_file_of_held_out_samples(make) -> None:
    job = make.job(evaluation={"uri": "pvc://more/held-out.jsonl", "maxSamples": 9})
    made = feeder.feeder(job, make.endpoint(), "agent:1", REDIS)
    env = env_of(made)
    assert env["COSERVE_EVAL_PATH"] == "/data/more/held-out.jsonl"
    assert (env["COSERVE_EVAL_PERCENT"], env["COSERVE_EVAL_MAX_SAMPLES"]) == ("0", "9")
    mounts = [each["mountPath"] for each in pod_of(made)["containers"][0]["volumeMounts"]]
    assert mounts == ["/tmp", "/models/models", "/data/data", "/data/more"]
    assert feeder.inputs_digest(job, make.endpoint()) != feeder.inputs_digest(make.job(), make.endpoint())


def test_two_files_of_one_claim_are_one_mount(make) -> None:
    made = feeder.feeder(make.job(evaluation={"uri": "pvc://data/e.jsonl"}), make.endpoint(), "agent:1", REDIS)
    mounts = [each["mountPath"] for each in pod_of(made)["containers"][0]["volumeMounts"]]
    assert mounts == ["/tmp", "/models/models", "/data/data"]


def test_a_feeder_that_an_older_operator_made_is_not_made_anew(make) -> None:
    """Its inputs are those of a job without the fields that came later."""
    names = {name for name in env_of(feeder.feeder(make.job(), make.endpoint(), "agent:1", REDIS)) if "EVAL" in name}
    assert names == {"COSERVE_EVAL_PERCENT"}


def test_the_autoscaler_aims_at_saturation_through_the_endpoints_own_scale(make) -> None:
    assert owned.autoscaler(make.endpoint()) is None
    scaling = {
        "maxReplicas": 4,
        "targetSaturationPercent": 60,
        "behavior": {"scaleDown": {"stabilizationWindow": "2m"}},
    }
    spec = owned.autoscaler(make.endpoint(autoscaling=scaling))["spec"]
    assert spec["scaleTargetRef"] == {"apiVersion": "coserve.dev/v1alpha1", "kind": "InferenceEndpoint", "name": "tiny"}
    assert spec["metrics"][0]["object"]["target"] == {"type": "Value", "value": "60"}
    assert spec["metrics"][0]["object"]["describedObject"] == spec["scaleTargetRef"]
    assert spec["behavior"]["scaleDown"] == {"stabilizationWindowSeconds": 120}


def test_a_pause_of_somebody_elses_is_a_field_of_ours(make) -> None:
    """Of a Deployment that is paused no agent is ever replaced, and nothing tells."""
    assert agents.deployment(make.endpoint(), 2, "agent:1", REDIS)["spec"]["paused"] is False


def test_everything_is_owned_so_that_deletion_needs_no_operator(make) -> None:
    for manifest in everything(make, autoscaling={"maxReplicas": 2}):
        uid = "j-1" if manifest["kind"] == "Job" else "e-1"
        assert is_owned_by(manifest, uid)
        assert not is_owned_by(manifest, "another")


def test_nothing_of_the_parents_metadata_is_handed_on(make) -> None:
    """An owned object with the label by which Argo CD or Flux tracks its owner is one that they prune."""
    tracked = {"labels": {"app.kubernetes.io/instance": "x"}, "annotations": {"argocd.argoproj.io/tracking-id": "x"}}

    def endpoint(**spec):
        body = make.endpoint_body(**spec)
        return InferenceEndpoint.from_dict(body | {"metadata": body["metadata"] | tracked})

    def job():
        body = make.job_body()
        return FinetuneJob.from_dict(body | {"metadata": body["metadata"] | tracked})

    scaled = {"autoscaling": {"maxReplicas": 2}}
    assert everything(SimpleNamespace(endpoint=endpoint, job=job), **scaled) == everything(make, **scaled)


def test_an_owner_is_not_kept_from_being_deleted(make) -> None:
    """blockOwnerDeletion needs rights on the owner's finalizers where OwnerReferencesPermissionEnforcement is on."""
    for manifest in everything(make, autoscaling={"maxReplicas": 2}):
        (reference,) = manifest["metadata"]["ownerReferences"]
        assert "blockOwnerDeletion" not in reference


def test_long_names_stay_labels_and_apart() -> None:
    assert short_name("job", "feeder") == "job-feeder"
    names = {short_name("x" * 60 + tail, "feeder") for tail in "ab"}
    assert len(names) == 2
    assert max(map(len, names)) <= 63


def test_the_selector_picks_agents_and_no_feeders() -> None:
    assert selector("tiny") == "app.kubernetes.io/name=coserve-agent,coserve.dev/endpoint=tiny"


FULL = {
    "template": TEMPLATE,
    "autoscaling": {"maxReplicas": 3},
    "finetuning": {"feeder": {name: TEMPLATE[name] for name in ("env", "volumes", "volumeMounts")}},
}


@pytest.mark.apiserver
@pytest.mark.parametrize("spec", [{}, FULL], ids=["least", "full"])
def test_a_real_api_server_takes_everything_and_the_pods_are_restricted(api_server, make, spec) -> None:
    namespace = {
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": "ml", "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
    }  # fmt: skip
    assert api_server.kubectl("apply", "-f", "-", stdin=json.dumps(namespace)).returncode == 0
    manifests = everything(make, **spec)
    account = api_server.kubectl("apply", "-f", "-", stdin=json.dumps(manifests[0]))
    assert account.returncode == 0, account.stderr
    for manifest in manifests:
        done = api_server.kubectl("apply", "--server-side", "--dry-run=server", "-f", "-", stdin=json.dumps(manifest))
        assert done.returncode == 0, (manifest["kind"], done.stderr)
        assert "would violate" not in done.stderr, done.stderr
        if "template" in manifest.get("spec", {}):
            pod = {
                "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one", "namespace": "ml"},
                "spec": pod_of(manifest),
            }  # fmt: skip
            done = api_server.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(pod))
            assert done.returncode == 0, (manifest["kind"], done.stderr)
    unsafe = pod | {"spec": pod["spec"] | {"securityContext": {}}}
    refused = api_server.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(unsafe))
    assert "violates PodSecurity" in refused.stderr
