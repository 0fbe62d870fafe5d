# SPDX-License-Identifier: Apache-2.0
"""Nobody gets what is not theirs: two tenants on one API server, with one operator between them."""

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from fedpipe_api.base import UserError
from fedpipe_api.names import ADAPTER_READER, JOB_LABEL, NODE_LABEL, child_name
from fedpipe_operator.kube.get import fetch
from fedpipe_operator.kube.pod_creation import REFUSED_SECONDS
from kube.cluster import CUSTOM, Cluster, taking
from kube.controlplane import ControlPlane
from kube.objects import owner

FORCE = {"gracePeriodSeconds": 0}


@pytest.fixture(scope="module")
def cluster(control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A tenant with a finished job and one at work; another tenant without any; one operator for both."""
    control_plane.needs("RBAC")
    one = Cluster(control_plane, "access", tmp_path_factory.mktemp("access"))
    for name in ("edge-1", "edge-2"):
        one.add_node(name)
    one.add_tenant(rival(one))
    with one.running("--watch", rival(one)):
        one.submit("done")
        one.wait_phase("Succeeded", "done")
        one.submit("busy", rounds={"count": 9999, "minUpdates": 2}, podTemplate=taking(0.3))
        one.wait_phase("Training", "busy")
        yield one


def rival(cluster: Cluster) -> str:
    return f"{cluster.name}-rival"


def job_uid(cluster: Cluster, name: str) -> str:
    found = cluster.job(name)
    assert found is not None
    return str(found["metadata"]["uid"])


def agent_pod(cluster: Cluster, job: str, node: str) -> dict[str, Any]:
    return cluster.pods()[child_name(job, f"{cluster.name}-{node}")]


def token_of(cluster: Cluster, pod: dict[str, Any]) -> str:
    """Return a token of audience fedpipe for a Pod, as its kubelet would get it."""
    meta = pod["metadata"]
    bound = {"apiVersion": "v1", "kind": "Pod", "name": meta["name"], "uid": meta["uid"]}
    return cluster.token(meta["namespace"], "default", audiences=["fedpipe"], boundObjectRef=bound)


def impostor(cluster: Cluster, namespace: str, job: str, claimed: str, node: str) -> dict[str, Any]:
    """Create a Pod on `node` that says it is the agent of somebody's job on the node `claimed`."""
    meta = {
        "name": child_name(job, claimed),
        "labels": {JOB_LABEL: job},
        "annotations": {NODE_LABEL: claimed},
        "ownerReferences": [owner(job, job_uid(cluster, job))],
    }
    spec = {"containers": [{"name": "agent", "image": "mine"}], "nodeName": node}
    return cluster.create(f"/api/v1/namespaces/{namespace}/pods", {"metadata": meta, "spec": spec})


def remove(cluster: Cluster, pod: dict[str, Any]) -> None:
    meta = pod["metadata"]
    path = f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}"
    assert cluster.plane.request("DELETE", path, FORCE)[0] == 200


# Adapters


def test_an_adapter_is_for_those_who_may_get_it(cluster: Cluster) -> None:
    assert cluster.adapter("done", None)[0] == 401
    assert cluster.adapter("done", "nonsense")[0] == 401
    code, body = cluster.adapter("done", cluster.reader_token(rival(cluster)))
    assert code == 403
    account = f"system:serviceaccount:{rival(cluster)}:{ADAPTER_READER}"
    assert f"{account} cannot get fedpipejobs/adapter in namespace {cluster.namespace}" in body.decode()
    assert cluster.adapter("done", cluster.reader_token())[0] == 200


def test_no_other_token_reads_an_adapter(cluster: Cluster) -> None:
    assert cluster.adapter("done", cluster.plane.token)[0] == 401, "the administrator's, of another audience"
    assert cluster.adapter("done", cluster.token(cluster.namespace, ADAPTER_READER))[0] == 401
    assert cluster.adapter("done", token_of(cluster, agent_pod(cluster, "busy", "edge-1")))[0] == 401
    powerless = cluster.token(cluster.namespace, "default", audiences=["fedpipe-adapter"])
    assert cluster.adapter("done", powerless)[0] == 403


def test_a_stranger_does_not_learn_which_jobs_there_are(cluster: Cluster) -> None:
    stranger = cluster.reader_token(rival(cluster))
    assert {cluster.adapter(job, stranger)[0] for job in ("done", "nobody")} == {403}
    assert cluster.adapter("nobody", cluster.reader_token())[0] == 404


def test_the_plain_port_has_probes_only(cluster: Cluster) -> None:
    assert cluster.get("/healthz") == b"ok"
    plain = f"http://127.0.0.1:{cluster.health_port}"
    for path in ("/metrics", f"/v1/jobs/{cluster.namespace}/done/adapter"):
        assert cluster._open(plain + path, {}, 10)[0] == 404


def test_an_agent_does_not_read_what_the_output_pod_reads(cluster: Cluster) -> None:
    token = token_of(cluster, agent_pod(cluster, "busy", "edge-1"))
    assert cluster.dial("/v1/job", token)[0] == 200
    assert cluster.dial("/v1/adapter", token)[0] == 401
    assert cluster.dial("/v1/adapter", None)[0] == 401
    assert cluster.dial("/v1/rounds?after=-1", token)[0] == 401


# Through the API server


@pytest.fixture(scope="module")
def exposed(cluster: Cluster) -> str:
    """A Service in front of the coordinator, on an address that Endpoints may have; return its proxy's path."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        address = probe.getsockname()[0]
    if address.startswith("127."):
        pytest.skip("this machine has no address that a Service may lead to")
    port = cluster.forward(address)
    service = {
        "metadata": {"name": "fedpipe"},
        "spec": {"ports": [{"name": "coordinator", "port": 8443, "targetPort": port}]},
    }
    cluster.create(f"/api/v1/namespaces/{cluster.own}/services", service)
    # The API server leads only to addresses that are a Pod's.
    pods = f"/api/v1/namespaces/{cluster.own}/pods"
    spec = {"containers": [{"name": "x", "image": "x"}], "nodeName": "nowhere"}
    cluster.add_account(cluster.own, "default")
    cluster.create(pods, {"metadata": {"name": "fedpipe-0"}, "spec": spec})
    cluster.patch(f"{pods}/fedpipe-0/status", {"status": {"podIP": address, "podIPs": [{"ip": address}]}})
    target = {"kind": "Pod", "name": "fedpipe-0", "namespace": cluster.own}
    ports = [{"name": "coordinator", "port": port}]
    subsets = [{"addresses": [{"ip": address, "targetRef": target}], "ports": ports}]
    endpoints = {"metadata": {"name": "fedpipe"}, "subsets": subsets}
    cluster.create(f"/api/v1/namespaces/{cluster.own}/endpoints", endpoints)
    return f"/api/v1/namespaces/{cluster.own}/services/https:fedpipe:coordinator/proxy"


def person(cluster: Cluster, name: str, home: str) -> str:
    """Create somebody with the rights that `edit` has in a namespace, and the chart's on the proxy."""
    cluster.add_account(home, name)
    core = {"apiGroups": [""], "verbs": ["get", "create"]}
    edit = core | {"resources": ["configmaps", "serviceaccounts/token"]}
    cluster.allow(home, name, edit, within=home)
    proxy = core | {"resources": ["services/proxy"], "resourceNames": ["https:fedpipe:coordinator"]}
    cluster.allow(home, name, proxy | {"verbs": ["get"]}, within=cluster.own)
    return cluster.token(home, name)


async def test_fedpipe_get_finds_the_operator_and_fetches(cluster: Cluster, exposed: str) -> None:
    config = cluster.plane.kubeconfig_for("alice", person(cluster, "alice", cluster.namespace))
    body = await fetch(config, cluster.namespace, "done", None)
    assert body == cluster.adapter("done", cluster.reader_token())[1]
    assert body == await fetch(config, cluster.namespace, "done", (cluster.own, "fedpipe"))
    with pytest.raises(UserError, match="there is no job nobody"):
        await fetch(config, cluster.namespace, "nobody", None)


async def test_fedpipe_get_ends_at_the_namespace(cluster: Cluster, exposed: str) -> None:
    config = cluster.plane.kubeconfig_for("mallory", person(cluster, "mallory", rival(cluster)))
    with pytest.raises(UserError, match=r"ConfigMap access-jobs/fedpipe-ca: .*forbidden"):
        await fetch(config, cluster.namespace, "done", None)
    with pytest.raises(
        UserError, match=r"a token of ServiceAccount access-jobs/fedpipe-adapter-reader: .*forbidden"
    ):
        await fetch(config, cluster.namespace, "done", (cluster.own, "fedpipe"))
    with pytest.raises(UserError, match="namespace access-rival has no ConfigMap fedpipe-ca"):
        await fetch(config, rival(cluster), "done", None)


async def test_fedpipe_get_says_what_a_namespace_lacks(cluster: Cluster, exposed: str) -> None:
    with pytest.raises(
        UserError, match="kubectl create serviceaccount fedpipe-adapter-reader -n access-fedpipe"
    ):
        await fetch(cluster.plane.kubeconfig, cluster.own, "done", (cluster.own, "fedpipe"))


def test_the_proxy_alone_opens_nothing(cluster: Cluster, exposed: str) -> None:
    path = f"{exposed}/v1/jobs/{cluster.namespace}/done/adapter"
    assert cluster.plane.request("GET", path)[0] == 401, "an administrator's Authorization is not handed on"
    assert cluster.plane.request("GET", f"{exposed}/v1/job")[0] == 401


# Metrics


def test_metrics_are_for_those_who_may_get_them(cluster: Cluster) -> None:
    assert cluster.metrics(None)[0] == 401
    assert cluster.metrics("nonsense")[0] == 401
    code, body = cluster.metrics(cluster.token(cluster.namespace, "default"))
    assert (code, b"cannot get /metrics" in body) == (403, True)
    assert cluster.metrics(cluster.reader_token())[0] == 401, "a token for adapters"
    code, body = cluster.metrics(cluster.token(cluster.own, "prometheus"))
    assert code == 200
    assert b"fedpipe_job_phase" in body


# Agents


def test_a_pod_elsewhere_is_no_agent_of_the_job_that_it_names(cluster: Cluster) -> None:
    node = f"{cluster.name}-edge-1"
    before = agent_pod(cluster, "busy", "edge-1")["metadata"]["uid"]
    pod = impostor(cluster, rival(cluster), "busy", node, node)
    try:
        assert cluster.dial("/v1/job", token_of(cluster, pod))[0] == 401
        own = agent_pod(cluster, "busy", "edge-1")
        assert cluster.dial("/v1/job", token_of(cluster, own))[0] == 200
        done = cluster.status("busy")["round"]
        cluster.wait("more rounds", lambda: cluster.status("busy")["round"] >= done + 2)
        assert agent_pod(cluster, "busy", "edge-1")["metadata"]["uid"] == before, "it is not in the way"
    finally:
        remove(cluster, pod)
    assert "is not of the namespace and name of the job" in cluster.log()


def test_a_pod_of_another_node_is_no_agent_of_the_node_that_it_names(cluster: Cluster) -> None:
    claimed = f"{cluster.name}-edge-9"
    pod = impostor(cluster, cluster.namespace, "busy", claimed, f"{cluster.name}-edge-1")
    assert cluster.dial("/v1/job", token_of(cluster, pod))[0] == 401
    remove(cluster, pod)
    tokens = []

    def taken_in() -> bool:
        # The operator removes the Pod of a node that it did not choose, perhaps before we call.
        one = impostor(cluster, cluster.namespace, "busy", claimed, claimed)
        tokens.append(token_of(cluster, one))
        code = cluster.dial("/v1/job", tokens[-1])[0]
        meta = one["metadata"]
        path = f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}"
        assert cluster.plane.request("DELETE", path, FORCE)[0] in (200, 404)
        return code == 200

    cluster.wait("the agent of its own node", taken_in)
    cluster.wait("it ends with its Pod", lambda: cluster.dial("/v1/job", tokens[-1])[0] == 401)


def test_an_agent_ends_with_its_owner(cluster: Cluster) -> None:
    pod = agent_pod(cluster, "busy", "edge-2")
    token, path = token_of(cluster, pod), f"/api/v1/namespaces/{cluster.namespace}/pods/"
    assert cluster.dial("/v1/job", token)[0] == 200
    cluster.patch(path + pod["metadata"]["name"], {"metadata": {"ownerReferences": None}})
    cluster.wait("refused", lambda: cluster.dial("/v1/job", token)[0] == 401, 20)
    remove(cluster, pod)
    # The operator may have met the Pod in the way of a new one, and tries again after its pause.
    name = child_name("busy", f"{cluster.name}-edge-2")
    cluster.wait("a new one", lambda: name in cluster.pods(), REFUSED_SECONDS + 60)


def test_an_agent_ends_with_its_pod(cluster: Cluster) -> None:
    token = token_of(cluster, agent_pod(cluster, "done", "edge-1"))
    assert cluster.dial("/v1/job", token)[0] == 401, "it has succeeded"
    pod = agent_pod(cluster, "busy", "edge-1")
    token = token_of(cluster, pod)
    assert cluster.dial("/v1/job", token)[0] == 200
    remove(cluster, pod)
    cluster.wait("refused", lambda: cluster.dial("/v1/job", token)[0] == 401, 20)


def test_a_job_in_the_other_namespace_is_its_own(cluster: Cluster) -> None:
    """The same name in another namespace is another job, whose readers see nothing of this one."""
    body = {"apiVersion": "fedpipe.io/v1alpha1", "kind": "FedPipeJob", "metadata": {"name": "done"}}
    found = cluster.job("done")
    assert found is not None
    path = f"{CUSTOM}/namespaces/{rival(cluster)}/fedpipejobs"
    cluster.create(path, body | {"spec": found["spec"] | {"suspend": True}})
    token = cluster.reader_token(rival(cluster))
    cluster.wait(
        "it is known",
        lambda: b"no adapter" in cluster.dial(f"/v1/jobs/{rival(cluster)}/done/adapter", token)[1],
    )
    assert cluster.adapter("done", token)[0] == 403
    cluster.plane.request("DELETE", f"{path}/done")
