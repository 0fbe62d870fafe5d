# SPDX-License-Identifier: Apache-2.0
"""Against a real API server: the operator makes no Pod that does without its node's policy."""

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest

from chart.rendering import NAMESPACE, template
from fedpipe_operator.kube.pods import build_agent_pod, build_tracker_pod
from fedpipe_operator.kube.settings import OperatorSettings
from fedpipe_operator.kube.views import capacity_view, node_view
from kube.controlplane import ControlPlane
from kube.objects import capacity, job, node

VALUES = {
    "agent": {
        "image": {"repository": "agent", "tag": "1"},
        "policyDirectory": "/etc/fedpipe",
        "budgetDirectory": "/srv/budget",
    },
    "operator": {"image": {"repository": "op", "tag": "1"}},
}
SETTINGS = OperatorSettings(
    namespace=NAMESPACE, service="fedpipe", store=Path("/store"), agent_image="agent:1", operator_image="op:1",
    policy_directory="/etc/fedpipe", budget_directory="/srv/budget",
)  # fmt: skip
ADMISSION = "/apis/admissionregistration.k8s.io/v1"
RBAC = "/apis/rbac.authorization.k8s.io/v1"
PODS = "/api/v1/namespaces/policed/pods?dryRun=All"


@pytest.fixture(scope="module")
def operator(control_plane: ControlPlane) -> tuple[ControlPlane, str]:
    """The control plane with the chart's admission policy, and a token of the operator's ServiceAccount."""
    plane = control_plane
    plane.needs("admission policies")

    def create(path: str, body: dict[str, Any]) -> Any:
        code, answer = plane.request("POST", path, body)
        assert code in (200, 201, 409), answer
        return answer

    for name in (NAMESPACE, "policed"):
        create("/api/v1/namespaces", {"metadata": {"name": name}})
        account = {"metadata": {"name": "default"}}
        create(f"/api/v1/namespaces/{name}/serviceaccounts", account)
    documents = template(VALUES)
    [account] = [
        d for d in documents if d["kind"] == "ServiceAccount" and d["metadata"]["name"] == "fedpipe-operator"
    ]
    create(f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts", account)
    role = {
        "metadata": {"name": "pods"},
        "rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": ["*"]}],
    }
    create(f"{RBAC}/clusterroles", role)
    subject = {"kind": "ServiceAccount", "name": "fedpipe-operator", "namespace": NAMESPACE}
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "pods"}
    create(
        f"{RBAC}/clusterrolebindings",
        {"metadata": {"name": "pods"}, "roleRef": reference, "subjects": [subject]},
    )
    for kind, path in (
        ("ValidatingAdmissionPolicy", "validatingadmissionpolicies"),
        ("ValidatingAdmissionPolicyBinding", "validatingadmissionpolicybindings"),
    ):
        [found] = [d for d in documents if d["kind"] == kind and d["metadata"]["name"] == "fedpipe-operator"]
        create(f"{ADMISSION}/{path}", found)
    path = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/fedpipe-operator/token"
    token = create(path, {"kind": "TokenRequest", "apiVersion": "authentication.k8s.io/v1", "spec": {}})
    # The API server takes a moment to learn of a policy.
    bare = {"metadata": {"name": "bare"}, "spec": {"containers": [{"name": "a", "image": "mine"}]}}
    deadline = time.monotonic() + 60
    while plane.request("POST", PODS, bare, token=token["status"]["token"])[0] == 201:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return plane, token["status"]["token"]


def agent(template: dict[str, Any] | None = None) -> dict[str, Any]:
    given = {} if template is None else {"podTemplate": template}
    pod = build_agent_pod(
        job(**given), node_view(node("edge-1")), capacity_view(capacity("edge-1")), SETTINGS
    )
    pod["metadata"]["namespace"] = "policed"
    return pod


def of_agent(**fields: Any) -> dict[str, Any]:
    return agent({"spec": {"containers": [{"name": "agent", **fields}]}})


def changed(**volumes: Any) -> dict[str, Any]:
    pod = copy.deepcopy(agent())
    for volume in pod["spec"]["volumes"]:
        if volume["name"] in volumes:
            volume.pop("hostPath", None)
            volume.pop("emptyDir", None)
            volume.pop("projected", None)
            volume.update(volumes[volume["name"]])
    return pod


def without(mount: str) -> dict[str, Any]:
    pod = agent()
    [container] = pod["spec"]["containers"]
    container["volumeMounts"] = [m for m in container["volumeMounts"] if m["name"] != mount]
    return pod


def test_its_own_pods_are_let_in(operator: tuple[ControlPlane, str]) -> None:
    plane, token = operator
    tracker = build_tracker_pod(
        job(tracking={"mlflow": {"uri": "http://mlflow:5000", "secretName": "s"}}), "edge-1", SETTINGS
    )
    tracker["metadata"]["namespace"] = "policed"
    tolerating = agent({"spec": {"tolerations": [{"operator": "Exists"}]}})
    for pod in (agent(), tolerating, tracker):
        code, answer = plane.request("POST", PODS, pod, token=token)
        assert code == 201, answer


@pytest.mark.parametrize(
    ("pod", "why"),
    [
        (without("policy"), "mounts agent.policyDirectory at /etc/fedpipe"),
        (without("budget"), "mounts agent.budgetDirectory at /var/lib/fedpipe-budget"),
        (changed(policy={"emptyDir": {}}), "mounts agent.policyDirectory"),
        (changed(policy={"hostPath": {"path": "/home/lax", "type": "Directory"}}), "mounts agent.policyDirectory"),
        (changed(budget={"emptyDir": {}}), "mounts agent.budgetDirectory"),
        (changed(tmp={"hostPath": {"path": "/home/code"}}), "mounts nothing"),
        (of_agent(image="mine"), "its own images and commands alone"),
        (of_agent(command=["sh", "-c", "cat /data/*"]), "its own images and commands alone"),
        (of_agent(env=[{"name": "PYTHONPATH", "value": "/model"}]), "sets no environment"),
        # Python imports what is in its user's directory: of a model, of the data.
        (of_agent(env=[{"name": "HOME", "value": "/model"}]), "sets no environment"),
        (changed(identity={"configMap": {"name": "forged"}}), "has the kubelet's token"),
        (changed(identity={"projected": {"sources": [{"configMap": {"name": "forged"}}]}}), "has the kubelet's token"),
        (of_agent(lifecycle={"postStart": {"exec": {"command": ["sh"]}}}), "sets no environment, hooks"),
        (of_agent(volumeMounts=[{"name": "tmp", "mountPath": "/etc/fedpipe/policy.yaml"}]), "mounts nothing"),
        (of_agent(volumeMounts=[{"name": "tmp", "mountPath": "/opt/fedpipe"}]), "mounts nothing"),
        (agent({"spec": {"containers": [{"name": "side", "image": "mine"}]}}), "its own images and commands"),
        (agent({"spec": {"initContainers": [{"name": "first", "image": "mine"}]}}), "its own images"),
    ],
)  # fmt: skip
def test_a_pod_that_could_do_without_the_policy_is_refused(
    operator: tuple[ControlPlane, str], pod: dict[str, Any], why: str
) -> None:
    plane, token = operator
    code, answer = plane.request("POST", PODS, pod, token=token)
    assert code == 403, answer
    assert why in json.dumps(answer)
