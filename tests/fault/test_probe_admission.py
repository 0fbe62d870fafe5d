# SPDX-License-Identifier: Apache-2.0
"""Against a real API server: what role and admission policy let the probe write, and who owns what."""

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedpipe_agent.probe import status
from fedpipe_agent.probe.publish import Cluster, Publisher, PublishError
from fedpipe_api.node import FedPipeNodeStatus
from kube.controlplane import ControlPlane
from nvml import golden
from nvml.running import running, until
from nvml.standin import StandIn, board, standin

__all__ = ["standin"]

NODES = "/apis/fedpipe.io/v1alpha1/fedpipenodes"
APPLY = "application/apply-patch+yaml"
MANIFESTS = Path(__file__).parents[1] / "nvml/admission.yaml"
ADMISSION = "/apis/admissionregistration.k8s.io/v1"
PATHS = {
    "ServiceAccount": "/api/v1/namespaces/default/serviceaccounts",
    "ClusterRole": "/apis/rbac.authorization.k8s.io/v1/clusterroles",
    "ClusterRoleBinding": "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
    "ValidatingAdmissionPolicy": f"{ADMISSION}/validatingadmissionpolicies",
    "ValidatingAdmissionPolicyBinding": f"{ADMISSION}/validatingadmissionpolicybindings",
}

STRANGER = {"apiVersion": "v1", "kind": "Node", "name": "x", "uid": "1"}

ClusterFor = Callable[..., Cluster]


@pytest.fixture(scope="module")
def policed(control_plane: ControlPlane) -> ControlPlane:
    """The control plane with the kinds, the role, the policy and two Nodes."""
    control_plane.needs("RBAC and admission policies")
    control_plane.install_crds()
    for manifest in yaml.safe_load_all(MANIFESTS.read_text()):
        path = f"{PATHS[manifest['kind']]}/{manifest['metadata']['name']}?fieldManager=test&force=true"
        code, answer = control_plane.request("PATCH", path, manifest, APPLY)
        assert code in (200, 201), answer
    for name in ("probed-1", "probed-2"):
        node = {"kind": "Node", "apiVersion": "v1", "metadata": {"name": name}}
        create(control_plane, "/api/v1/nodes", node)
    return control_plane


def create(plane: ControlPlane, path: str, body: dict[str, Any]) -> dict[str, Any]:
    code, answer = plane.request("POST", path, body)
    assert code == 201, answer
    return answer


@pytest.fixture
def cluster_for(policed: ControlPlane, tmp_path: Path) -> ClusterFor:
    """Gives the cluster as a probe's Pod on a node sees it; with `bound` False the token names no Pod."""

    def make(node: str, bound: bool = True) -> Cluster:
        reference = {}
        if bound:
            pod = create(
                policed,
                "/api/v1/namespaces/default/pods",
                {
                    "kind": "Pod",
                    "apiVersion": "v1",
                    "metadata": {"generateName": "probe-"},
                    "spec": {
                        "serviceAccountName": "fedpipe-probe",
                        "nodeName": node,
                        "containers": [{"name": "probe", "image": "probe"}],
                    },
                },
            )["metadata"]
            reference = {
                "boundObjectRef": {"kind": "Pod", "apiVersion": "v1", "name": pod["name"], "uid": pod["uid"]}
            }
        request = {"kind": "TokenRequest", "apiVersion": "authentication.k8s.io/v1", "spec": reference}
        path = f"{PATHS['ServiceAccount']}/fedpipe-probe/token"
        token = tmp_path / f"token-{time.monotonic_ns()}"
        token.write_text(create(policed, path, request)["status"]["token"])
        return Cluster(policed.url, token, policed.ca)

    return make


@pytest.fixture
def enforced(policed: ControlPlane, cluster_for: ClusterFor) -> None:
    """The API server takes a moment to learn of a policy."""
    token = cluster_for("probed-2").read_token()

    def refused() -> bool:
        code, _ = apply(policed, "probed-none", {}, token)
        return code == 403

    until(refused, 20)


def apply(
    plane: ControlPlane, name: str, content: dict[str, Any], token: str = "", subresource: str = ""
) -> tuple[int, Any]:
    body = {"apiVersion": "fedpipe.io/v1alpha1", "kind": "FedPipeNode"}
    content = content | {"metadata": {"name": name} | content.get("metadata", {})}
    path = f"{NODES}/{name}{subresource}?fieldManager={'probe' if token else 'operator'}&force=true"
    return plane.request("PATCH", path, body | content, APPLY, token=token)


def seen(name: str, directory: Path) -> FedPipeNodeStatus:
    reading = StandIn(directory, board(name)).read()
    return status.build(reading, golden.CPU, now=golden.NOW)


@pytest.mark.usefixtures("enforced")
def test_a_probe_writes_its_own_node_whole(
    policed: ControlPlane, cluster_for: ClusterFor, tmp_path: Path
) -> None:
    cluster = cluster_for("probed-1")
    publisher = Publisher(cluster)
    written = seen("a100-mig", tmp_path)
    assert publisher.load() is None
    publisher.write(written)
    _, found = policed.request("GET", f"{NODES}/probed-1")
    assert FedPipeNodeStatus.model_validate(found["status"]) == written
    _, node = policed.request("GET", "/api/v1/nodes/probed-1")
    owner = found["metadata"]["ownerReferences"]
    assert owner == [{"apiVersion": "v1", "kind": "Node", "name": "probed-1", "uid": node["metadata"]["uid"]}]
    assert {entry["manager"] for entry in found["metadata"]["managedFields"]} == {"fedpipe-probe"}

    # Devices that went away leave the object; a restarted probe finds its last report.
    fewer = seen("t4", tmp_path)
    publisher.write(fewer)
    assert Publisher(cluster).load() == fewer


@pytest.mark.usefixtures("enforced")
def test_verified_precisions_of_the_operator_survive_every_write(
    policed: ControlPlane, cluster_for: ClusterFor, tmp_path: Path
) -> None:
    publisher = Publisher(cluster_for("probed-2"))
    reported = seen("t4", tmp_path)
    publisher.write(reported)
    proven = {"precision": "nf4", "verified": True, "usable": False, "seconds": 0.5, "message": "no kernel"}
    code, answer = apply(policed, "probed-2", {"status": {"precisions": [proven]}}, subresource="/status")
    assert code == 200, answer
    # The probe has not seen that write; its own comes on top without treading on it, again and again.
    for _ in range(2):
        publisher.write(reported)
        _, found = policed.request("GET", f"{NODES}/probed-2")
        entries = {entry["precision"]: entry for entry in found["status"]["precisions"]}
        assert entries["nf4"] == proven
        assert entries["int8"] == {"precision": "int8", "verified": False, "usable": True}
    assert [support.precision for support in publisher.verified] == ["nf4"]
    merged = status.build(None, golden.CPU, now=golden.NOW, verified=publisher.verified)
    assert "nf4" not in merged.precision_summary


@pytest.fixture
def recorded(policed: ControlPlane, cluster_for: ClusterFor, tmp_path: Path) -> dict[str, Any]:
    """What the operator recorded of probed-1, beside what the node's probe derived."""
    Publisher(cluster_for("probed-1")).write(seen("t4", tmp_path))
    broken = {"precision": "nf4", "verified": True, "usable": False, "message": "no kernel image"}
    works = {"precision": "fp32", "verified": True, "usable": True, "seconds": 1}
    code, answer = apply(
        policed, "probed-1", {"status": {"precisions": [broken, works]}}, subresource="/status"
    )
    assert code == 200, answer
    return precisions(policed, "probed-1")


def precisions(plane: ControlPlane, name: str) -> dict[str, Any]:
    _, found = plane.request("GET", f"{NODES}/{name}")
    return {entry["precision"]: entry for entry in found["status"]["precisions"]}


FALSE_CLAIMS = {
    "broken is usable": {"precision": "nf4", "verified": True, "usable": True, "seconds": 0.001},
    "broken is unverified": {"precision": "nf4", "verified": False},
    "another reason": {"precision": "nf4", "message": "out of memory"},
    "a time for what never ran": {"precision": "nf4", "seconds": 0.5},
    "usable is broken": {"precision": "fp32", "usable": False},
    "faster": {"precision": "fp32", "seconds": 0.001},
    "works, but": {"precision": "fp32", "message": "slow"},
    "one more proven": {"precision": "int8", "verified": True},
}


@pytest.mark.usefixtures("enforced")
@pytest.mark.parametrize("claim", FALSE_CLAIMS.values(), ids=FALSE_CLAIMS)
def test_a_probe_may_not_change_what_was_proven(
    policed: ControlPlane, cluster_for: ClusterFor, recorded: dict[str, Any], claim: dict[str, Any]
) -> None:
    token = cluster_for("probed-1").read_token()
    content = {"status": {"precisions": [claim]}}
    code, answer = apply(policed, "probed-1", content, token, "/status")
    assert code == 403
    assert "only the operator" in answer["message"]
    # Through the object itself nothing of the status is written, for any caller.
    code, answer = apply(policed, "probed-1", content, token)
    assert code == 200, answer
    assert precisions(policed, "probed-1") == recorded


@pytest.mark.usefixtures("enforced")
@pytest.mark.parametrize(
    ("manager", "patch"),
    [
        # Without fields of its own in them, an applied configuration takes away those its manager had.
        ("operator", {"precisions": []}),
        ("other", {"precisions": [{"precision": "nf4"}]}),
        ("other", {"precisions": None}),
        ("other", None),
    ],
)
def test_a_probe_may_not_take_away_what_was_proven(
    policed: ControlPlane,
    cluster_for: ClusterFor,
    recorded: dict[str, Any],
    manager: str,
    patch: dict[str, Any] | None,
) -> None:
    token = cluster_for("probed-1").read_token()
    body = {"apiVersion": "fedpipe.io/v1alpha1", "kind": "FedPipeNode", "metadata": {"name": "probed-1"}}
    path, kind = f"{NODES}/probed-1/status?fieldManager={manager}", "application/merge-patch+json"
    if manager == "operator":
        path, kind = f"{path}&force=true", APPLY
    code, answer = policed.request("PATCH", path, body | {"status": patch}, kind, token=token)
    assert code == 403
    assert "only the operator" in answer["message"]
    assert precisions(policed, "probed-1") == recorded


@pytest.mark.usefixtures("enforced")
def test_a_probe_goes_on_beside_all_that_the_operator_records(
    policed: ControlPlane, cluster_for: ClusterFor, tmp_path: Path
) -> None:
    publisher = Publisher(cluster_for("probed-1"))
    reported = seen("t4", tmp_path)
    publisher.write(reported)
    reason = precisions(policed, "probed-1")["bf16"]["message"]
    assert "needs 8.0" in reason
    for usable in (True, False, True):
        proven = {"precision": "bf16", "verified": True, "usable": usable}
        proven |= {"seconds": 0.25} if usable else {"message": "wrong result"}
        code, answer = apply(policed, "probed-1", {"status": {"precisions": [proven]}}, subresource="/status")
        assert code == 200, answer
        for _ in range(2):
            # The probe's own reason against a precision that proved usable goes with the first write.
            publisher.write(reported)
            assert precisions(policed, "probed-1")["bf16"] == proven
        assert [support.precision for support in publisher.verified] == ["bf16"]
    # Another probe of the node, restarted, finds all that and writes on; fewer devices are no matter.
    restarted = Publisher(cluster_for("probed-1"))
    restarted.load()
    restarted.write(seen("a100-mig", tmp_path))
    assert precisions(policed, "probed-1")["bf16"] == proven
    # What the operator no longer says is the probe's to derive again.
    code, _ = apply(policed, "probed-1", {"status": {}}, subresource="/status")
    assert code == 200
    restarted.write(reported)
    assert precisions(policed, "probed-1")["bf16"]["message"] == reason


@pytest.mark.usefixtures("enforced")
@pytest.mark.parametrize(
    ("content", "subresource", "complaint"),
    [
        ({"spec": {"unschedulable": True}}, "", "spec is for people"),
        (
            {"metadata": {"ownerReferences": [STRANGER]}},
            "",
            "the only owner",
        ),
        (
            {"status": {"precisions": [{"precision": "bf16", "verified": True}]}},
            "/status",
            "only the operator",
        ),
    ],
)
def test_a_probe_may_not_say_this_even_of_its_own_node(
    policed: ControlPlane,
    cluster_for: ClusterFor,
    content: dict[str, Any],
    subresource: str,
    complaint: str,
) -> None:
    cluster = cluster_for("probed-1")
    Publisher(cluster).load()
    code, answer = apply(policed, "probed-1", content, cluster.read_token(), subresource)
    assert code == 403
    assert complaint in answer["message"]


@pytest.mark.usefixtures("enforced")
def test_a_probe_may_not_touch_another_node(policed: ControlPlane, cluster_for: ClusterFor) -> None:
    Publisher(cluster_for("probed-1")).load()
    token = cluster_for("probed-2").read_token()
    for subresource, content in (("", {}), ("/status", {"status": {"source": "cpu"}})):
        code, answer = apply(policed, "probed-1", content, token, subresource)
        assert code == 403
        assert "only the FedPipeNode of its own Node, probed-2" in answer["message"]
    code, _ = policed.request("DELETE", f"{NODES}/probed-2", token=token)
    assert code == 403
    code, _ = policed.request("GET", NODES, token=token)
    assert code == 403


@pytest.mark.usefixtures("enforced")
def test_a_token_that_names_no_node_writes_nothing(policed: ControlPlane, cluster_for: ClusterFor) -> None:
    cluster = cluster_for("probed-1", bound=False)
    code, answer = apply(policed, "probed-1", {}, cluster.read_token())
    assert code == 403
    assert "bound to no Node" in answer["message"]
    with pytest.raises(PublishError, match="names no Node"):
        Publisher(cluster).load()


@pytest.mark.usefixtures("enforced")
def test_the_probe_as_a_process_reports_over_tls(
    policed: ControlPlane, cluster_for: ClusterFor, standin: StandIn
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cluster = cluster_for("probed-1")
    with running(cluster, standin.environment, "--interval", "200ms", port=port) as probe:
        until(lambda: probe.metric("fedpipe_probe_writes_total") >= 1)
        code, log = probe.stop()
    assert code == 0, log
    _, found = policed.request("GET", f"{NODES}/probed-1")
    assert found["status"]["deviceSummary"] == "Tesla T4", json.dumps(found)
