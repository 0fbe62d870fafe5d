# SPDX-License-Identifier: Apache-2.0
"""The operator on a real API server: its own process, its own rights, agents as processes."""

import json
import re
import tarfile
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from fedpipe_api.base import UserError
from fedpipe_operator.kube.get import unpack
from kube.cluster import CUSTOM, Cluster, taking
from kube.controlplane import ControlPlane
from kube.forked_operator import PROGRAM
from standins.object_store import KEY, SECRET, ObjectStore


@pytest.fixture(scope="module")
def object_store() -> Iterator[ObjectStore]:
    """A store that the operator of all tests here allows."""
    one = ObjectStore()
    yield one
    one.close()


@pytest.fixture(scope="module")
def cluster(
    control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory, object_store: ObjectStore
) -> Iterator[Cluster]:
    """Three nodes, kubelets and a running operator, for all tests here."""
    one = Cluster(control_plane, "operator", tmp_path_factory.mktemp("operator"))
    one.program = PROGRAM
    for name in ("edge-1", "edge-2", "edge-3"):
        one.add_node(name)
    with one.running("--output-allow", f"s3://adapters/team,{object_store.url}"):
        yield one


@pytest.fixture
def name(request: pytest.FixtureRequest, cluster: Cluster) -> Iterator[str]:
    """The test's own job name; the job and its Pods are gone afterwards."""
    own = re.sub("[^a-z0-9]+", "-", request.node.name.removeprefix("test_").lower())[:60].strip("-")
    yield own
    cluster.plane.request("DELETE", cluster.job_path(own))
    cluster.wait(f"{own} is gone", lambda: cluster.job(own) is None)
    cluster.wait("its Pods are gone", lambda: not pods_of(cluster, own))


def pods_of(cluster: Cluster, name: str) -> dict[str, Any]:
    return {n: p for n, p in cluster.pods().items() if p["metadata"]["labels"]["fedpipe.io/job"] == name}


def test_a_job_trains_and_succeeds(cluster: Cluster, name: str) -> None:
    cluster.submit(name)
    status = cluster.wait_phase("Succeeded", name)
    losses = [entry["loss"] for entry in status["history"]]
    assert losses == sorted(losses, reverse=True)
    assert status["nodes"]["summary"] == "3/3"
    assert cluster.condition("Complete", name)[:2] == ("True", "RoundsCompleted")
    reasons = [reason for reason, _ in cluster.events(name)]
    assert reasons.count("RoundDone") == 3
    assert "Planned" in reasons
    proven = cluster.plane.request("GET", f"{CUSTOM}/fedpipenodes/operator-edge-1")[1]["status"]["precisions"]
    assert all(entry["verified"] for entry in proven)


def test_kubectl_shows_a_finished_job(cluster: Cluster, name: str) -> None:
    cluster.plane.needs("kubectl")
    cluster.submit(name)
    cluster.wait_phase("Succeeded", name)
    line = cluster.plane.kubectl("get", "fpj", name, "-n", cluster.namespace).stdout.splitlines()[1]
    assert line.split()[:5] == [name, "Succeeded", "RoundsCompleted", "3/3", "3/3"], line


def test_a_finished_adapter_is_fetched_and_its_pods_end(cluster: Cluster, name: str, tmp_path: Path) -> None:
    cluster.submit(name)
    cluster.wait_phase("Succeeded", name)
    code, body = cluster.adapter(name, cluster.reader_token())
    assert code == 200
    unpack(body, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    phases = lambda: {p["status"]["phase"] for p in pods_of(cluster, name).values()}  # noqa: E731
    cluster.wait("agents end by themselves", lambda: phases() == {"Succeeded"})
    with pytest.raises(UserError, match="unexpected archive"):
        unpack(_tar("../../etc/passwd"), tmp_path / "other")
    assert cluster.adapter("nobody", cluster.reader_token())[0] == 404


def _tar(name: str) -> bytes:
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    return buffer.getvalue()


def secret_of(cluster: Cluster, secret_name: str, **data: str) -> None:
    path = f"/api/v1/namespaces/{cluster.namespace}/secrets"
    cluster.create(path, {"metadata": {"name": secret_name}, "stringData": data})


def test_the_adapter_is_written_to_volume_and_url(
    cluster: Cluster, name: str, object_store: ObjectStore
) -> None:
    secret_of(cluster, "writer", AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET)
    volume = {"persistentVolumeClaim": {"claimName": "models", "path": "adapters"}}
    cluster.submit(name, output={"volume": volume, "url": "s3://adapters/team/", "secretName": "writer"})
    cluster.wait("written", lambda: cluster.condition("Output", name)[:2] == ("True", "OutputWritten"))
    assert cluster.condition("Output", name)[2] == f"claim models/adapters/{name}, s3://adapters/team/{name}"
    directory = cluster.directory / "output" / "adapters" / name
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    stored = {f"/adapters/team/{name}/{file}": content for file, content in files.items()}
    assert stored.items() <= object_store.objects.items()
    assert cluster.status(name)["adapter"]["path"].startswith("claim models/")


def test_an_output_that_cannot_be_written_says_so(cluster: Cluster, name: str) -> None:
    cluster.submit(name, output={"url": "s3://adapters/team", "secretName": "absent"})
    cluster.wait("failed", lambda: cluster.condition("Output", name)[:2] == ("False", "OutputFailed"))
    message = cluster.condition("Output", name)[2]
    assert "spec.output.secretName: credentials for s3:// are missing; give AWS_ACCESS_KEY_ID" in message
    assert cluster.status(name)["phase"] == "Succeeded"
    # Once the Secret is there, the Pod that tries again writes it.
    secret_of(cluster, "absent", AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET)


def test_what_a_store_answers_is_not_passed_on(
    cluster: Cluster, name: str, object_store: ObjectStore
) -> None:
    object_store.answer = (403, b"PRIVATE-ANSWER of another service")
    secret_of(cluster, "known", AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET)
    cluster.submit(name, output={"url": "s3://adapters/team", "secretName": "known"})
    cluster.wait("failed", lambda: cluster.condition("Output", name)[:2] == ("False", "OutputFailed"))
    assert "the object store denies the upload" in cluster.condition("Output", name)[2]
    pods = json.dumps(pods_of(cluster, name))
    for secret in ("PRIVATE-ANSWER", "403", SECRET):
        assert secret not in json.dumps(cluster.status(name)) + json.dumps(cluster.events(name))
    assert "PRIVATE-ANSWER" not in pods + cluster.log()
    object_store.answer = None


@pytest.mark.parametrize("url", ["s3://adapters/team-b", "s3://adapters", "gs://adapters/team"])
def test_a_store_that_is_not_allowed_is_refused_before_anything_runs(
    cluster: Cluster, name: str, url: str
) -> None:
    cluster.submit(name, output={"url": url, "secretName": "writer"})
    cluster.wait("refused", lambda: cluster.condition("Accepted", name)[:2] == ("False", "Invalid"))
    message = cluster.condition("Accepted", name)[2]
    assert message.startswith("spec.output.url: this cluster allows not that object store")
    assert "output.allowed in the values of the chart" in message
    assert not pods_of(cluster, name)


def test_a_selector_without_nodes_says_why(cluster: Cluster, name: str) -> None:
    cluster.submit(name, nodes={"selector": {"matchLabels": {"site": "nowhere"}}})
    text = "0 of 3 nodes can be used; 3: labels do not match spec.nodes.selector"
    cluster.wait("why", lambda: cluster.status(name).get("message") == text)
    assert cluster.status(name)["phase"] == "Pending"
    assert cluster.condition("Complete", name)[1] == "NoMatchingNodes"
    assert not pods_of(cluster, name)


MISTAKES = [
    ({"spec": {"restartPolicy": "Perhaps"}}, "restartPolicy"),
    (
        {"spec": {"containers": [{"name": "agent", "imagee": "mine:1"}]}},
        'unknown field "spec.containers[0].imagee"',
    ),
    ({"spec": {"affinity": {"nodeAffinity": []}}}, "spec.podTemplate.spec.affinity: must be an object"),
]


@pytest.mark.parametrize(("template", "reported"), MISTAKES, ids=["value", "typo", "kind"])
def test_a_podtemplate_that_kubernetes_refuses_is_invalid(
    cluster: Cluster, name: str, template: Any, reported: str
) -> None:
    cluster.plane.needs("the validation of Pods")
    cluster.submit(name, podTemplate=template)
    cluster.wait("refused", lambda: cluster.condition("Accepted", name)[:2] == ("False", "Invalid"))
    assert reported in cluster.condition("Accepted", name)[2]
    assert not pods_of(cluster, name)
    cluster.patch(cluster.job_path(name), {"spec": {"podTemplate": None}})
    cluster.wait_phase("Succeeded", name)
    assert cluster.condition("Accepted", name)[0] == "True"


def test_an_image_that_cannot_be_pulled_is_reported(cluster: Cluster, name: str) -> None:
    template = {"spec": {"containers": [{"name": "agent", "image": "missing:1"}]}}
    assert cluster.kubelet is not None
    cluster.kubelet.missing_images.add("missing:1")
    started = time.monotonic()
    cluster.submit(name, podTemplate=template)
    cluster.wait("reported", lambda: "no such image: missing:1" in json.dumps(cluster.status(name)))
    assert time.monotonic() - started < 60
    rows = {row["state"] for row in cluster.status(name)["nodeTable"]}
    assert rows == {"lost"}


def test_a_volume_that_cannot_be_mounted_is_reported(cluster: Cluster, name: str) -> None:
    """Nothing in such a Pod's status says why it waits; the kubelet's Events do."""
    assert cluster.kubelet is not None
    cluster.kubelet.missing_claims.add("gone")
    started = time.monotonic()
    source = {"volume": {"persistentVolumeClaim": {"claimName": "gone"}}, "train": "train.jsonl"}
    cluster.submit(name, data=source)
    text = "its Pod does not start: FailedMount: MountVolume.SetUp failed"
    cluster.wait("reported", lambda: text in json.dumps(cluster.status(name)))
    assert time.monotonic() - started < 60
    assert cluster.condition("Stalled", name)[0] == "True"


def test_a_deleted_ca_comes_back_for_the_pods_that_wait_for_it(cluster: Cluster, name: str) -> None:
    cluster.submit(f"{name}-before", rounds={"count": 1, "localSteps": 2, "minUpdates": 2})
    cluster.wait_phase("Succeeded", f"{name}-before")
    path = f"/api/v1/namespaces/{cluster.namespace}/configmaps/fedpipe-ca"
    assert cluster.plane.request("DELETE", path)[0] == 200
    cluster.submit(name)
    cluster.wait_phase("Succeeded", name, 120)
    cluster.plane.request("DELETE", cluster.job_path(f"{name}-before"))


def test_suspend_stops_agents_and_resume_goes_on(cluster: Cluster, name: str) -> None:
    cluster.submit(name, rounds={"count": 6, "localSteps": 2, "minUpdates": 2}, podTemplate=taking(0.5))
    cluster.wait("a round", lambda: cluster.status(name).get("round", 0) >= 1)
    cluster.patch(cluster.job_path(name), {"spec": {"suspend": True}})
    cluster.wait_phase("Suspended", name)
    cluster.wait("no Pods", lambda: not pods_of(cluster, name))
    before = cluster.status(name)["round"]
    cluster.patch(cluster.job_path(name), {"spec": {"suspend": False}})
    status = cluster.wait_phase("Succeeded", name, 90)
    assert status["round"] == 6 > before


def test_a_job_created_suspended_waits_for_its_queue(cluster: Cluster, name: str) -> None:
    cluster.submit(name, suspend=True)
    cluster.wait_phase("Suspended", name)
    assert not pods_of(cluster, name)
    cluster.patch(cluster.job_path(name), {"spec": {"suspend": False}})
    cluster.wait_phase("Succeeded", name)


def test_deletion_while_training_leaves_nothing(cluster: Cluster, name: str) -> None:
    cluster.submit(name, rounds={"count": 500, "minUpdates": 2}, podTemplate=taking(0.2))
    cluster.wait_phase("Training", name)
    cluster.wait("series", lambda: f'job="{name}"' in (cluster.get("/metrics") or b"").decode())
    cluster.plane.request("DELETE", cluster.job_path(name))
    cluster.wait("the job is gone", lambda: cluster.job(name) is None)
    cluster.wait("its Pods are gone", lambda: not pods_of(cluster, name))
    assert f'job="{name}"' not in (cluster.get("/metrics") or b"").decode()


def test_ttl_removes_a_finished_job(cluster: Cluster, name: str) -> None:
    cluster.submit(name, ttlSecondsAfterFinished=1)
    cluster.wait("gone", lambda: cluster.job(name) is None)


def test_an_active_deadline_fails_the_job(cluster: Cluster, name: str) -> None:
    cluster.submit(name, activeDeadlineSeconds=6, rounds={"count": 9999}, podTemplate=taking(1))
    cluster.wait_phase("Failed", name)
    assert cluster.condition("Complete", name)[:2] == ("False", "DeadlineExceeded")


def test_rounds_may_grow_but_not_shrink(cluster: Cluster, name: str) -> None:
    cluster.submit(name, rounds={"count": 50, "minUpdates": 2}, podTemplate=taking(0.3))
    cluster.wait_phase("Training", name)
    path = cluster.job_path(name)
    code, answer = cluster.plane.request(
        "PATCH", path, {"spec": {"rounds": {"count": 3}}}, "application/merge-patch+json"
    )
    assert code == 422
    assert "may grow but not shrink" in answer["message"]
    cluster.patch(path, {"spec": {"rounds": {"count": 60}}})
    cluster.wait("edited", lambda: cluster.status(name).get("rounds", "").endswith("/60"))
    assert cluster.status(name)["observedGeneration"] == 2


def test_a_new_template_rolls_agents_between_rounds(cluster: Cluster, name: str) -> None:
    cluster.submit(name, rounds={"count": 400, "minUpdates": 2}, podTemplate=taking(0.2))
    cluster.wait_phase("Training", name)
    before = {p["metadata"]["uid"] for p in pods_of(cluster, name).values()}
    cluster.patch(cluster.job_path(name), {"spec": {"podTemplate": taking(0.1)}})

    def rolled() -> bool:
        now = {p["metadata"]["uid"] for p in pods_of(cluster, name).values()}
        return len(now) == 3 and not now & before

    cluster.wait("all Pods are new", rolled)
    done = cluster.status(name)["round"]
    cluster.wait("it goes on", lambda: cluster.status(name)["round"] > done)


def test_two_jobs_share_a_gpu_node_one_after_the_other(cluster: Cluster, name: str) -> None:
    for node in ("gpu-1", "gpu-2"):
        cluster.add_node(node, gpus=1, site="gpu")
    selector = {"selector": {"matchLabels": {"site": "gpu"}}, "min": 2}
    long = {"count": 40, "minUpdates": 2}
    cluster.submit(name, nodes=selector, rounds=long, podTemplate=taking(0.3))
    cluster.wait_phase("Training", name)
    cluster.submit("second", nodes=selector)
    text = f"its GPU is used by job {cluster.namespace}/{name}"
    cluster.wait("why it waits", lambda: text in cluster.status("second").get("message", ""))
    assert not pods_of(cluster, "second")
    cluster.patch(cluster.job_path(name), {"spec": {"suspend": True}})
    cluster.wait_phase("Succeeded", "second")
    cluster.patch(cluster.job_path(name), {"spec": {"suspend": False}})
    cluster.wait_phase("Training", name)
    cluster.wait("it has its nodes back", lambda: cluster.status(name)["nodes"]["summary"] == "2/2")
    cluster.plane.request("DELETE", cluster.job_path("second"))


def test_only_the_pods_own_token_is_an_agent(cluster: Cluster, name: str) -> None:
    cluster.submit(name, rounds={"count": 400, "minUpdates": 2}, podTemplate=taking(0.3))
    cluster.wait_phase("Training", name)
    assert cluster.kubelet is not None
    [pod, *_] = pods_of(cluster, name).values()
    directory = cluster.kubelet.directory / pod["metadata"]["uid"]

    def call(token: str) -> int:
        return cluster.dial("/v1/job", token)[0]

    def token(account: str, **spec: Any) -> str:
        return cluster.token(cluster.namespace, account, **spec)

    stranger = {
        "metadata": {"name": "stranger"},
        "spec": {"containers": [{"name": "x", "image": "x"}], "nodeName": "nowhere"},
    }
    other = cluster.create(f"/api/v1/namespaces/{cluster.namespace}/pods", stranger)["metadata"]
    bound = {"apiVersion": "v1", "kind": "Pod", "name": other["name"], "uid": other["uid"]}
    own = (directory / "token").read_text()
    assert call(own) == 200
    assert call("nonsense") == 401
    assert call(own[:-6] + "AAAAAA") == 401
    assert call(cluster.plane.token) == 401
    assert call(token("default", audiences=["fedpipe"])) == 401
    assert call(token("default", audiences=["other"])) == 401
    assert call(token("default", audiences=["fedpipe"], boundObjectRef=bound)) == 401
    cluster.plane.request(
        "DELETE", f"/api/v1/namespaces/{cluster.namespace}/pods/stranger", {"gracePeriodSeconds": 0}
    )
    log = cluster.log()
    assert "an agent was refused: Pod" in log
    assert "is not bound to a Pod" in log
    assert own not in log


def test_the_writes_of_a_round_are_few(cluster: Cluster, name: str) -> None:
    def writes() -> float:
        text = (cluster.get("/metrics") or b"").decode()
        lines = [
            line for line in text.splitlines() if line.startswith("fedpipe_operator_api_requests_total{")
        ]
        kinds = [line for line in lines if 'verb="status"' in line or 'verb="event"' in line]
        return sum(float(line.rsplit(" ", 1)[1]) for line in kinds)

    cluster.submit(name, rounds={"count": 400, "minUpdates": 2}, podTemplate=taking(1.0))
    cluster.wait("rounds", lambda: cluster.status(name).get("round", 0) >= 2)
    first, at = cluster.status(name)["round"], writes()
    cluster.wait("more rounds", lambda: cluster.status(name)["round"] >= first + 6)
    rounds, spent = cluster.status(name)["round"] - first, writes() - at
    print(f"{spent / rounds:.2f} API writes per round")
    assert spent / rounds <= 3
