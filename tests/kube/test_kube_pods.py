# SPDX-License-Identifier: Apache-2.0
"""The agent Pod: valid for Kubernetes, restricted, pinned, and what a podTemplate may change of it."""

import json
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from fedpipe_api.base import UserError
from fedpipe_api.names import child_name
from fedpipe_operator.kube.merge import strategic_merge
from fedpipe_operator.kube.pods import build_agent_pod, build_tracker_pod, build_writer_pod, template_digest
from fedpipe_operator.kube.settings import AllowedStore, OperatorSettings
from fedpipe_operator.kube.views import TRACKER, WRITER, capacity_view, node_view, own_pod_name, pod_view
from kube.objects import UID, capacity, job, node

SETTINGS = OperatorSettings(
    namespace="fedpipe", service="fedpipe", store=Path("/store"), agent_image="agent:1", operator_image="op:1"
)


def build(
    the_job: Any = None, the_node: Any = None, report: Any = None, settings: OperatorSettings = SETTINGS
) -> Any:
    body = the_node or node("edge-1")
    name = body["metadata"]["name"]
    return build_agent_pod(
        the_job or job(), node_view(body), capacity_view(report or capacity(name)), settings
    )


def volumes(pod: Any) -> dict[str, Any]:
    return {volume["name"]: volume for volume in pod["spec"]["volumes"]}


def mounts(pod: Any) -> dict[str, Any]:
    return {mount["mountPath"]: mount for mount in pod["spec"]["containers"][0]["volumeMounts"]}


def test_it_is_a_valid_pod_of_the_job_on_the_node() -> None:
    pod = build()
    kubernetes_validate.validate(pod, "1.36", strict=True)
    assert pod["metadata"]["name"] == child_name("tickets", "edge-1")
    [owner] = pod["metadata"]["ownerReferences"]
    assert (owner["uid"], owner["controller"]) == (UID, True)
    [term] = pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"
    ]
    assert term["matchFields"] == [{"key": "metadata.name", "operator": "In", "values": ["edge-1"]}]
    arguments = pod["spec"]["containers"][0]["args"]
    assert arguments == [
        "--coordinator", "https://fedpipe.fedpipe.svc:8443", "--model", "/model", "--data", "/data",
        "--token-file", "/var/run/fedpipe/token", "--ca-file", "/var/run/fedpipe/ca.crt",
    ]  # fmt: skip


def test_a_job_whose_data_is_stored_nowhere_gets_no_pod() -> None:
    with pytest.raises(UserError, match=r"spec\.data\.volume: required on a cluster"):
        build(job(data={"train": "train.jsonl"}))


def test_the_agent_is_reported_what_the_probe_measured_and_no_new_pod_is_made_for_it() -> None:
    report = capacity("edge-1")
    report["status"]["linkRate"] = 1_500_000
    pod = build(report=report)
    assert pod["spec"]["containers"][0]["args"][-2:] == ["--link-rate", "1500000"]
    assert pod["metadata"]["annotations"] == build()["metadata"]["annotations"]


def test_it_meets_pod_security_restricted() -> None:
    spec = build()["spec"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    security = spec["containers"][0]["securityContext"]
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert security["readOnlyRootFilesystem"]
    assert spec["automountServiceAccountToken"] is False


def test_data_and_model_are_read_only_and_the_claim_is_the_nodes_own() -> None:
    model = {
        "persistentVolumeClaim": {"claimName": "models", "path": "bert"},
        "task": "causal-lm",
    }
    pod = build(job(model=model))
    assert volumes(pod)["data"]["persistentVolumeClaim"] == {"claimName": "tickets-edge-1", "readOnly": True}
    assert mounts(pod)["/data"]["readOnly"]
    assert mounts(pod)["/model"] == {
        "name": "model", "mountPath": "/model", "readOnly": True, "subPath": "bert"
    }  # fmt: skip


def test_a_hub_model_comes_through_the_nodes_cache() -> None:
    source = {"huggingFace": {"repo": "o/m", "revision": "abc"}, "task": "causal-lm"}
    pod = build(job(model=source))
    assert "o/m@abc" in pod["spec"]["containers"][0]["args"]
    assert volumes(pod)["cache"]["emptyDir"] == {}
    kept = build(
        job(model=source), settings=OperatorSettings(**vars(SETTINGS) | {"model_cache": "/var/cache/fedpipe"})
    )
    assert volumes(kept)["cache"]["hostPath"] == {"path": "/var/cache/fedpipe", "type": "Directory"}


def test_the_token_is_bound_to_the_audience_and_expires() -> None:
    sources = volumes(build())["identity"]["projected"]["sources"]
    token = sources[0]["serviceAccountToken"]
    assert token == {"audience": "fedpipe", "expirationSeconds": 3600, "path": "token"}
    assert sources[1]["configMap"]["name"] == "fedpipe-ca"


@pytest.mark.parametrize(
    ("resources", "limit"),
    [
        ({"nvidia_com_gpu": "2"}, {"nvidia.com/gpu": "1"}),
        ({"nvidia_com_mig-1g.5gb": "4", "nvidia_com_mig-3g.20gb": "1"}, {"nvidia.com/mig-3g.20gb": "1"}),
        ({"nvidia_com_gpu": "0", "nvidia_com_mig-1g.5gb": "4"}, {"nvidia.com/mig-1g.5gb": "1"}),
        ({"nvidia_com_gpu": "0"}, None),
    ],
)
def test_a_gpu_is_asked_for_as_the_node_offers_it(resources: dict[str, str], limit: Any) -> None:
    settings = OperatorSettings(**vars(SETTINGS) | {"runtime_class": "nvidia"})
    body = node("edge-1")
    body["status"]["allocatable"] |= {k.replace("_com_", ".com/"): v for k, v in resources.items()}
    pod = build(the_node=body, report=capacity("edge-1", gpus=1), settings=settings)
    kubernetes_validate.validate(pod, "1.36", strict=True)
    assert pod["spec"]["containers"][0]["resources"].get("limits") == limit
    assert pod["spec"]["runtimeClassName"] == "nvidia", "also where a device plugin hands GPUs out"
    cpu = build(the_node=body)
    assert "limits" not in cpu["spec"]["containers"][0]["resources"]
    assert "runtimeClassName" not in cpu["spec"]


def test_a_template_is_merged_by_names() -> None:
    template = {
        "metadata": {"labels": {"team": "support", "fedpipe.io/job": "forged"}, "annotations": {"note": "x"}},
        "spec": {
            "priorityClassName": "low",
            "tolerations": [{"key": "edge", "operator": "Exists"}],
            "containers": [
                {
                    "name": "agent",
                    "env": [{"name": "HF_HUB_OFFLINE", "value": "1"}, {"name": "HOME", "value": "/scratch"}],
                    "resources": {"limits": {"memory": "4Gi"}},
                    "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
                },
                {"name": "sidecar", "image": "log:1"},
            ],
            "volumes": [{"name": "scratch", "emptyDir": {}}, {"name": "tmp", "hostPath": {"path": "/t"}}],
            "affinity": {
                "nodeAffinity": {
                    "requiredDuringSchedulingIgnoredDuringExecution": {
                        "nodeSelectorTerms": [{"matchExpressions": [{"key": "zone", "operator": "Exists"}]}]
                    }
                }
            },
        },
    }
    gpu = node("edge-1")
    gpu["status"]["allocatable"]["nvidia.com/gpu"] = "1"
    pod = build(job(podTemplate=template), gpu, capacity("edge-1", gpus=1))
    kubernetes_validate.validate(pod, "1.36", strict=True)
    agent, sidecar = pod["spec"]["containers"]
    assert sidecar == {"name": "sidecar", "image": "log:1"}
    assert agent["image"] == "agent:1"
    assert agent["env"] == [
        {"name": "HOME", "value": "/scratch"}, {"name": "HF_HUB_OFFLINE", "value": "1"}
    ]  # fmt: skip
    assert agent["resources"]["limits"] == {"nvidia.com/gpu": "1", "memory": "4Gi"}
    assert len(pod["spec"]["tolerations"]) == 2
    assert volumes(pod)["tmp"] == {"name": "tmp", "hostPath": {"path": "/t"}}
    assert pod["metadata"]["labels"]["team"] == "support"
    assert pod["metadata"]["labels"]["fedpipe.io/job"] == "tickets"
    [term] = pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"
    ]
    assert term["matchExpressions"]
    assert term["matchFields"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"spec": {"containers": {"name": "agent"}}}, "spec.podTemplate.spec.containers: must be a list"),
        (
            {"spec": {"containers": [{"image": "x"}]}},
            "spec.podTemplate.spec.containers[0]: must be an object with a name",
        ),
        ({"metadata": {"labels": "x"}}, "spec.podTemplate.metadata.labels: must be an object"),
        ({"spec": {"securityContext": []}}, "spec.podTemplate.spec.securityContext: must be an object"),
        ({"spec": {"affinity": "here"}}, "spec.podTemplate.spec.affinity: must be an object"),
    ],
)
def test_a_template_that_does_not_fit_is_named(template: Any, message: str) -> None:
    with pytest.raises(UserError, match="^" + message.replace("[", r"\[")):
        build(job(podTemplate=template))


def test_a_gated_model_gets_its_token_from_a_secret_in_the_agent_alone() -> None:
    gated = {"huggingFace": {"repo": "org/gated", "tokenSecret": "hub"}, "task": "causal-lm"}
    pod = build(job(model=gated))
    kubernetes_validate.validate(pod, "1.36", strict=True)
    [container] = pod["spec"]["containers"]
    [token] = [entry for entry in container["env"] if entry["name"] == "HF_TOKEN"]
    reference = {"name": "hub", "key": "HF_TOKEN", "optional": True}
    assert token == {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": reference}}
    output = {"volume": {"hostPath": {"path": "/out"}}}
    writer = build_writer_pod(job(model=gated, output=output), "edge-1", SETTINGS)
    assert "hub" not in json.dumps(writer)
    open_model = {"huggingFace": {"repo": "org/open"}, "task": "causal-lm"}
    assert "HF_TOKEN" not in json.dumps(build(job(model=open_model)))


STORES = (AllowedStore.parse("s3://adapters,http://minio.storage.svc:9000"), AllowedStore.parse("gs://"))


def test_the_writer_mounts_the_secret_and_is_restricted() -> None:
    volume = {"persistentVolumeClaim": {"claimName": "models-{node}", "path": "a"}}
    output = {"url": "s3://adapters/x/", "secretName": "writer", "volume": volume}
    settings = OperatorSettings(**vars(SETTINGS) | {"output_allowed": STORES})
    pod = build_writer_pod(job(output=output), "edge-1", settings)
    kubernetes_validate.validate(pod, "1.36", strict=True)
    assert pod["metadata"]["namespace"] == "support"
    [container] = pod["spec"]["containers"]
    assert container["args"][6:] == [
        "--url", "s3://adapters/x/tickets", "--credentials", "/var/run/credentials",
        "--endpoint", "http://minio.storage.svc:9000", "--output", "/output/a/tickets",
    ]  # fmt: skip
    assert volumes(pod)["credentials"]["secret"]["secretName"] == "writer"
    assert mounts(pod)["/var/run/credentials"]["readOnly"]
    assert volumes(pod)["output"]["persistentVolumeClaim"] == {"claimName": "models-edge-1"}
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert "env" not in container, "no credentials in the environment"


def test_a_writer_to_a_store_that_is_not_allowed_any_more_is_not_built() -> None:
    output = {"url": "s3://adapters/x", "secretName": "writer"}
    with pytest.raises(UserError, match=r"spec.output.url: this cluster allows no object store"):
        build_writer_pod(job(output=output), "edge-1", SETTINGS)


def test_the_tracker_mounts_its_volume_and_reads_three_keys_of_its_secret() -> None:
    tracking = {
        "tensorBoard": True, "volume": {"hostPath": {"path": "/srv/events/"}},
        "mlflow": {"uri": "https://mlflow.lab:5000", "secretName": "login"},
    }  # fmt: skip
    pod = build_tracker_pod(job(tracking=tracking), "edge-1", SETTINGS)
    kubernetes_validate.validate(pod, "1.36", strict=True)
    [container] = pod["spec"]["containers"]
    assert container["args"][6:] == [
        "--tensorboard", "/output/tensorboard_runs/tickets",
        "--mlflow", "https://mlflow.lab:5000", "--experiment", "tickets",
    ]  # fmt: skip
    assert [entry["valueFrom"]["secretKeyRef"] for entry in container["env"]] == [
        {"name": "login", "optional": True, "key": f"MLFLOW_TRACKING_{key}"}
        for key in ("USERNAME", "PASSWORD", "TOKEN")
    ]
    assert volumes(pod)["output"]["hostPath"] == {"path": "/srv/events/", "type": "Directory"}
    assert "edge-1" in json.dumps(pod["spec"]["affinity"]), "the directory is of one node"
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert container["securityContext"]["readOnlyRootFilesystem"]
    claimed = tracking | {"volume": {"persistentVolumeClaim": {"claimName": "events"}}}
    assert "affinity" not in build_tracker_pod(job(tracking=claimed), "edge-1", SETTINGS)["spec"]


def test_no_agent_and_no_node_has_the_name_of_an_own_pod() -> None:
    names = [own_pod_name("a", component) for component in (WRITER, TRACKER)]
    agents = [child_name(job, node) for job in ("a", "a-tracking") for node in ("tracking", "a", "x")]
    assert len({*names, *agents}) == len(names) + len(agents)


def test_a_container_that_a_template_names_twice_is_merged_or_named() -> None:
    twice = [{"name": "side", "env": True}, {"name": "side", "env": []}]
    with pytest.raises(UserError, match=r"^spec.podTemplate.spec.containers\[1\].env: must be a list"):
        build(job(podTemplate={"spec": {"containers": twice}}))


def test_null_takes_a_field_away_and_other_lists_are_replaced() -> None:
    merged = strategic_merge({"a": {"b": 1, "c": 2}, "args": ["x"]}, {"a": {"b": None}, "args": ["y"]}, "t")
    assert merged == {"a": {"c": 2}, "args": ["y"]}


def test_the_digest_moves_with_what_needs_a_new_pod_and_with_nothing_else() -> None:
    first = template_digest(job(), SETTINGS)
    assert template_digest(job(rounds={"count": 9, "minUpdates": 2}), SETTINGS) == first
    assert template_digest(job(podTemplate={"spec": {"priorityClassName": "low"}}), SETTINGS) != first
    assert template_digest(job(), OperatorSettings(**vars(SETTINGS) | {"agent_image": "agent:2"})) != first


def test_a_long_node_name_is_kept_whole() -> None:
    name = "edge-" + "x" * 70 + ".example.org"
    pod = build(the_node=node(name))
    kubernetes_validate.validate(pod, "1.36", strict=True)
    assert len(pod["metadata"]["labels"]["fedpipe.io/node"]) <= 63
    pod["metadata"] |= {"uid": "u", "creationTimestamp": "2027-01-01T00:00:00Z"}
    view = pod_view(pod)
    assert view
    assert view.node == name
