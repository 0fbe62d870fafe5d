# SPDX-License-Identifier: Apache-2.0
"""The chart's life on a real API server, through the real Helm. No kubelet runs: hooks are played."""

import http.server
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml

from chart.hooks import HookRunner, token
from chart.rendering import CHART, NAMESPACE, REPOSITORY, pods, rendered
from kube.controlplane import ControlPlane, describe_binaries, find_binaries, start_control_plane

JOBS = "/apis/fedpipe.io/v1alpha1/namespaces/support/fedpipejobs"
NODES = "/apis/fedpipe.io/v1alpha1/fedpipenodes"
CLASSES = "/apis/storage.k8s.io/v1/storageclasses"
READERS = [{"namespace": "elsewhere", "name": "prometheus"}]
VALUES: dict[str, Any] = {"namespaces": ["support"], "metrics": {"readers": READERS}}
REVIEWS = "/apis/authorization.k8s.io/v1/subjectaccessreviews"
APPLY = "application/apply-patch+yaml"


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane without anything of FedPipe: Helm is to bring it."""
    binaries = find_binaries()
    if binaries is None:
        pytest.skip(f"needs a real API server for Helm; {describe_binaries()}")
    with start_control_plane(tmp_path_factory.mktemp("chart-cluster"), binaries) as plane:
        for name in (NAMESPACE, "support", "elsewhere"):
            labels = {"pod-security.kubernetes.io/enforce": "restricted"}
            body = {"metadata": {"name": name, "labels": labels}}
            assert plane.request("POST", "/api/v1/namespaces", body)[0] == 201
        yield plane


@pytest.fixture(scope="module")
def helm(plane: ControlPlane) -> Iterator[helm_python.Config]:
    with helm_python.Config(kubeconfig_path=plane.kubeconfig, namespace=NAMESPACE) as config:
        yield config


@pytest.fixture(scope="module")
def before(plane: ControlPlane) -> set[str]:
    return everything(plane)


def everything(plane: ControlPlane) -> set[str]:
    """Return every object of the cluster, but for what the cluster itself makes and forgets."""
    found = set()
    passing = ("APIService", "Event", "Lease")
    groups = [g["preferredVersion"]["groupVersion"] for g in plane.request("GET", "/apis")[1]["groups"]]
    for version in ["v1", *groups]:
        root = "/api/v1" if version == "v1" else f"/apis/{version}"
        status, answer = plane.request("GET", root)
        if status == 404:
            continue  # the group went with the last definition, meanwhile
        for resource in answer["resources"]:
            if "list" not in resource["verbs"] or "/" in resource["name"] or resource["kind"] in passing:
                continue
            for item in plane.request("GET", f"{root}/{resource['name']}")[1].get("items", []):
                found.add(
                    f"{resource['kind']} {item['metadata'].get('namespace', '')} {item['metadata']['name']}"
                )
    return found


def test_without_storage_the_install_says_what_to_do(plane: ControlPlane, helm: helm_python.Config) -> None:
    with pytest.raises(helm_python.HelmError, match=r"no default StorageClass.*the cluster has: none"):
        helm.install(CHART, "fedpipe", VALUES)
    body = {"metadata": {"name": "fast"}, "provisioner": "test"}
    assert plane.request("POST", CLASSES, body)[0] == 201
    with pytest.raises(helm_python.HelmError, match=r"no default StorageClass.*the cluster has: fast"):
        helm.install(CHART, "fedpipe", VALUES)
    with pytest.raises(helm_python.HelmError, match="has no StorageClass fats, only: fast"):
        helm.install(CHART, "fedpipe", VALUES | {"persistence": {"storageClass": "fats"}})
    default = {"metadata": {"annotations": {"storageclass.kubernetes.io/is-default-class": "true"}}}
    assert plane.request("PATCH", f"{CLASSES}/fast", default, "application/merge-patch+json")[0] == 200


def test_without_definitions_the_install_says_so(helm: helm_python.Config) -> None:
    with pytest.raises(helm_python.HelmError, match="does not have the CustomResourceDefinition fedpipejobs"):
        helm.install(CHART, "fedpipe", VALUES | {"crds": {"enabled": False}})


def test_install(plane: ControlPlane, helm: helm_python.Config, before: set[str]) -> None:
    assert not [thing for thing in before if "fedpipe.io" in thing]
    release = helm.install(CHART, "fedpipe", VALUES, timeout=60)
    assert release["status"] == "deployed"
    job = yaml.safe_load((REPOSITORY / "tests/chart/job.yaml").read_text())
    status, answer = plane.request("POST", JOBS, job)
    assert status == 201, answer


def test_pods_are_admitted_where_restricted_is_enforced(plane: ControlPlane) -> None:
    for name, spec in pods(rendered("default")):
        body = {
            "metadata": {"name": name},
            "spec": spec | {"restartPolicy": spec.get("restartPolicy", "Always")},
        }
        path = f"/api/v1/namespaces/{NAMESPACE}/pods?dryRun=All"
        plane.request("POST", f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts",
                      {"metadata": {"name": spec.get("serviceAccountName", "default")}})  # fmt: skip
        status, answer = plane.request("POST", path, body)
        assert status == 201, f"{name}: {answer['message']}"


def test_rights_end_where_they_should(plane: ControlPlane) -> None:
    operator = token(plane, NAMESPACE, "fedpipe-operator")

    def asked(path: str) -> int:
        return plane.request("GET", path, token=operator)[0]

    assert asked(JOBS) == 200
    assert asked("/api/v1/namespaces/support/pods") == 200
    assert asked(NODES) == 200
    for path in ("/apis/fedpipe.io/v1alpha1/fedpipejobs", "/api/v1/namespaces/elsewhere/pods",
                 "/api/v1/namespaces/support/secrets", "/api/v1/secrets"):  # fmt: skip
        assert asked(path) == 403, path


def test_readers_read_what_is_theirs(plane: ControlPlane) -> None:
    def allowed(user: str, **attributes: Any) -> bool:
        kind = "nonResourceAttributes" if "path" in attributes else "resourceAttributes"
        spec = {"user": user, "groups": ["system:authenticated"], kind: {"verb": "get"} | attributes}
        body = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec}
        status, answer = plane.request("POST", REVIEWS, body)
        assert status == 201, answer
        return bool(answer["status"]["allowed"])

    def adapter(user: str, namespace: str) -> bool:
        what = {"group": "fedpipe.io", "resource": "fedpipejobs", "subresource": "adapter"}
        return allowed(user, namespace=namespace, name="tickets", **what)

    def proxy(name: str) -> bool:
        return allowed("anybody", namespace=NAMESPACE, resource="services", subresource="proxy", name=name)

    reader = "system:serviceaccount:support:fedpipe-adapter-reader"
    assert adapter(reader, "support")
    assert not adapter(reader, "elsewhere")
    assert not adapter("system:serviceaccount:support:default", "support")
    assert not adapter("system:serviceaccount:elsewhere:fedpipe-adapter-reader", "support")
    assert allowed("system:serviceaccount:elsewhere:prometheus", path="/metrics")
    assert not allowed("system:serviceaccount:support:default", path="/metrics")
    assert proxy("https:fedpipe:coordinator")
    assert not proxy("https:fedpipe-metrics:https-metrics")
    # What the operator itself needs in order to ask.
    operator = f"system:serviceaccount:{NAMESPACE}:fedpipe-operator"
    for group, resource in (("authentication", "tokenreviews"), ("authorization", "subjectaccessreviews")):
        assert allowed(operator, group=f"{group}.k8s.io", resource=resource, verb="create")


@pytest.fixture(scope="module")
def probe_token(plane: ControlPlane) -> str:
    """The token of a probe on node edge-1, as the kubelet would get it."""
    assert plane.request("POST", "/api/v1/nodes", {"metadata": {"name": "edge-1"}})[0] == 201
    _, spec = next((n, s) for n, s in pods(rendered("default")) if n == "fedpipe-probe")
    body = {"metadata": {"name": "probe-of-edge-1"}, "spec": spec | {"nodeName": "edge-1"}}
    status, answer = plane.request("POST", f"/api/v1/namespaces/{NAMESPACE}/pods", body)
    assert status == 201, answer
    return token(plane, NAMESPACE, "fedpipe-probe", name="probe-of-edge-1", uid=answer["metadata"]["uid"])


def test_a_probe_writes_its_own_node_only(plane: ControlPlane, probe_token: str) -> None:
    def apply(name: str, part: str = "", **fields: Any) -> tuple[int, str]:
        body = {
            "apiVersion": "fedpipe.io/v1alpha1",
            "kind": "FedPipeNode",
            "metadata": {"name": name},
        } | fields
        path = f"{NODES}/{name}{part}?fieldManager=fedpipe-probe&force=true"
        status, answer = plane.request("PATCH", path, body, APPLY, token=probe_token)
        return status, answer.get("message", "")

    assert apply("edge-1")[0] == 201
    assert apply("edge-1", "/status", status={"source": "cpu"})[0] == 200
    status, answer = apply("edge-2")
    assert status == 403
    assert "a probe writes only the FedPipeNode of its own Node, edge-1" in answer
    # Somebody else's node, made by the administrator.
    body = {"apiVersion": "fedpipe.io/v1alpha1", "kind": "FedPipeNode", "metadata": {"name": "edge-2"}}
    assert plane.request("POST", NODES, body)[0] == 201
    assert apply("edge-2", "/status", status={"source": "cpu"})[0] == 403
    # An administrator's decision about the own node.
    decision = {"spec": {"unschedulable": True}}
    assert plane.request("PATCH", f"{NODES}/edge-1", decision, "application/merge-patch+json")[0] == 200
    assert "spec is for people" in apply("edge-1", spec={"unschedulable": False})[1]
    assert apply("edge-1", "/status", status={"source": "cpu"})[0] == 200
    # A token that names no node.
    body["metadata"]["name"] = "edge-1"
    unbound = token(plane, NAMESPACE, "fedpipe-probe")
    status, answer = plane.request("PATCH", f"{NODES}/edge-1?fieldManager=x", body, APPLY, token=unbound)
    assert (status, "bound to no Node" in answer["message"]) == (403, True)
    assert plane.request("DELETE", f"{NODES}/edge-1", token=probe_token)[0] == 403


def test_upgrade_and_rollback_keep_jobs_and_store(plane: ControlPlane, helm: helm_python.Config) -> None:
    claim = f"/api/v1/namespaces/{NAMESPACE}/persistentvolumeclaims/fedpipe-store"
    deployment = f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments/fedpipe-operator"

    def state() -> tuple[str, str, str]:
        [container] = plane.request("GET", deployment)[1]["spec"]["template"]["spec"]["containers"]
        uids = [plane.request("GET", path)[1]["metadata"]["uid"] for path in (f"{JOBS}/tickets", claim)]
        return uids[0], uids[1], " ".join(a for a in container["args"] if "class" in a)

    job, store, _ = state()
    changed = VALUES | {"agent": {"runtimeClassName": "nvidia"}}
    assert helm.upgrade(CHART, "fedpipe", changed, timeout=60)["revision"] == 2
    assert state() == (job, store, "--runtime-class=nvidia")
    # A mistake changes nothing: kinds that the cluster does not have, and a typo.
    for bad, answer in (
        (
            {"metrics": {"serviceMonitor": {"enabled": True}, "readers": READERS}},
            r"metrics\.serviceMonitor\.enabled needs the Prometheus",
        ),
        (
            {"metrics": {"rules": {"enabled": True}, "readers": READERS}},
            r"metrics\.rules\.enabled needs the Prometheus operator",
        ),
        ({"persistance": {"size": "5Gi"}}, "'persistance' not allowed"),
    ):
        with pytest.raises(helm_python.HelmError, match=answer):
            helm.upgrade(CHART, "fedpipe", VALUES | bad, timeout=60)
        assert state() == (job, store, "--runtime-class=nvidia")
    helm.rollback("fedpipe", version=1, timeout=60)
    assert state() == (job, store, "")


@pytest.fixture
def operator(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Servers that answer like an operator, and what DNS would say of them."""
    certificate, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=test", "-days", "1",
         "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    metrics, coordinator = (http.server.HTTPServer(("127.0.0.1", 0), _Refusing) for _ in range(2))
    for server in (metrics, coordinator):
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threads = [threading.Thread(target=server.serve_forever) for server in (metrics, coordinator)]
    for thread in threads:
        thread.start()
    yield {
        f"fedpipe-metrics.{NAMESPACE}.svc:8444": f"127.0.0.1:{metrics.server_port}",
        f"fedpipe.{NAMESPACE}.svc:8443": f"127.0.0.1:{coordinator.server_port}",
    }
    for server, thread in zip((metrics, coordinator), threads, strict=True):
        server.shutdown()
        server.server_close()
        thread.join()


class _Refusing(http.server.BaseHTTPRequestHandler):
    status = 401

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_smoke_test(plane: ControlPlane, helm: helm_python.Config, operator: dict[str, str]) -> None:
    with HookRunner(plane, NAMESPACE, operator) as hooks:
        helm.test("fedpipe", timeout=60)
    [done] = hooks.ran.values()
    assert "refuses strangers" in done.stdout


def test_smoke_test_fails_without_an_operator(plane: ControlPlane, helm: helm_python.Config) -> None:
    names = dict.fromkeys((f"fedpipe-metrics.{NAMESPACE}.svc:8444",), "127.0.0.1:1")
    with HookRunner(plane, NAMESPACE, names), pytest.raises(helm_python.HelmError):
        helm.test("fedpipe", timeout=60)
    forget_smoke(plane)


def test_smoke_test_fails_where_metrics_are_open(
    plane: ControlPlane, helm: helm_python.Config, operator: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Refusing, "status", 200)
    with HookRunner(plane, NAMESPACE, operator) as hooks, pytest.raises(helm_python.HelmError):
        helm.test("fedpipe", timeout=60)
    assert "asked without a token it answers" in next(iter(hooks.ran.values())).stderr
    forget_smoke(plane)


def forget_smoke(plane: ControlPlane) -> None:
    """A test that failed stays, so that its log can be read."""
    path = f"/api/v1/namespaces/{NAMESPACE}/pods/fedpipe-smoke?gracePeriodSeconds=0"
    assert plane.request("DELETE", path)[0] == 200


def test_uninstall_keeps_what_keep_says(
    plane: ControlPlane, helm: helm_python.Config, before: set[str]
) -> None:
    agent = {"metadata": {"name": "tickets-edge-1", "labels": {"fedpipe.io/job": "tickets"}},
             "spec": pods(rendered("default"))[0][1] | {"serviceAccountName": "default"}}  # fmt: skip
    plane.request("POST", "/api/v1/namespaces/support/serviceaccounts", {"metadata": {"name": "default"}})
    assert plane.request("POST", "/api/v1/namespaces/support/pods", agent)[0] == 201
    # What the operator makes as it runs.
    for path, name in (("support/configmaps", "fedpipe-ca"), (f"{NAMESPACE}/secrets", "fedpipe-tls")):
        assert plane.request("POST", f"/api/v1/namespaces/{path}", {"metadata": {"name": name}})[0] == 201
    job = plane.request("GET", f"{JOBS}/tickets")[1]
    assert job["metadata"]["finalizers"] == ["example.com/other", "fedpipe.io/finalizer"]
    nodes = "/apis/fedpipe.io/v1alpha1/fedpipenodes"
    found = [
        {"type": kind, "status": "True", "reason": reason, "lastTransitionTime": "2026-01-01T00:00:00Z"}
        for kind, reason in (("Ready", "CpuOnly"), ("DriverReady", "NoGpu"))
    ]
    status = {"status": {"conditions": found}}
    assert plane.request("PATCH", f"{nodes}/edge-1/status", status, "application/merge-patch+json")[0] == 200
    with HookRunner(plane, NAMESPACE) as hooks:
        helm.uninstall("fedpipe", timeout=120)
    assert [done.returncode for done in hooks.ran.values()] == [0], hooks.ran
    assert plane.request("GET", "/api/v1/namespaces/support/pods")[1]["items"] == []
    after = plane.request("GET", f"{JOBS}/tickets")[1]
    assert after["metadata"]["uid"] == job["metadata"]["uid"]
    assert after["metadata"]["finalizers"] == ["example.com/other"]
    left = plane.request("GET", f"{nodes}/edge-1")[1]["status"]["conditions"]
    assert {one["type"]: (one["status"], one["reason"]) for one in left} == {
        "Ready": ("Unknown", "ProbeUninstalled"), "DriverReady": ("True", "NoGpu")
    }  # fmt: skip
    kept = {"FedPipeJob", "FedPipeNode", "CustomResourceDefinition", "PersistentVolumeClaim"}
    own = {"StorageClass  fast", "Node  edge-1", f"Pod {NAMESPACE} probe-of-edge-1",
           f"ServiceAccount {NAMESPACE} default", "ServiceAccount support default"}  # fmt: skip
    left = everything(plane) - before - own
    assert {thing.split()[0] for thing in left} == kept, left


def test_a_second_install_takes_over_what_was_kept(plane: ControlPlane, helm: helm_python.Config) -> None:
    uid = plane.request("GET", f"{JOBS}/tickets")[1]["metadata"]["uid"]
    thrifty = VALUES | {"crds": {"keep": False}, "persistence": {"keep": False}}
    assert helm.install(CHART, "fedpipe", thrifty, timeout=60)["status"] == "deployed"
    assert plane.request("GET", f"{JOBS}/tickets")[1]["metadata"]["uid"] == uid
    clear = {"metadata": {"finalizers": None}}
    plane.request("PATCH", f"{JOBS}/tickets", clear, "application/merge-patch+json")
    with HookRunner(plane, NAMESPACE):
        helm.uninstall("fedpipe", timeout=120)
    # A claim's protection finalizer is the controller manager's to take away.
    left = {
        thing for thing in everything(plane) if "fedpipe" in thing.removeprefix(f"Namespace  {NAMESPACE}")
    }
    assert left - {f"Pod {NAMESPACE} probe-of-edge-1", f"ServiceAccount {NAMESPACE} default"} == {
        f"PersistentVolumeClaim {NAMESPACE} fedpipe-store"
    }
    claim = plane.request("GET", f"/api/v1/namespaces/{NAMESPACE}/persistentvolumeclaims/fedpipe-store")[1]
    assert "deletionTimestamp" in claim["metadata"]
