# SPDX-License-Identifier: Apache-2.0
"""Objects that the API server admits and nobody should send: the operator refuses them and serves the others."""

import http.client
import json
import re
import ssl
import urllib.parse
from collections.abc import Iterator

import pytest

from kube.cluster import CUSTOM, NODES, Cluster
from kube.controlplane import ControlPlane

DEPTHS = (30, 197, 250, 900, 4000, 9000)


@pytest.fixture(scope="module")
def cluster(control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes and a running operator, beside a FedPipeNode of the year 0."""
    one = Cluster(control_plane, "hostile", tmp_path_factory.mktemp("hostile"))
    for name in ("edge-1", "edge-2", "edge-3"):
        one.add_node(name)
    ancient = {"observedAt": "0000-01-01T00:00:00Z"}
    one.patch(f"{CUSTOM}/{NODES}/hostile-edge-3/status", {"status": ancient})
    with one.running():
        yield one


def raw(cluster: Cluster, method: str, path: str, text: str | None = None) -> tuple[int, str]:
    """Call the API with text that Python's own decoder and encoder could not take."""
    address = urllib.parse.urlsplit(cluster.plane.url)
    context = ssl.create_default_context(cafile=str(cluster.plane.ca))
    connection = http.client.HTTPSConnection(
        address.hostname or "", address.port, timeout=30, context=context
    )
    headers = {"Authorization": f"Bearer {cluster.plane.token}", "Content-Type": "application/json"}
    try:
        connection.request(method, path, text, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def raw_condition(cluster: Cluster, name: str) -> str:
    """Return the text of a job's condition Accepted, empty before there is one."""
    _, text = raw(cluster, "GET", cluster.job_path(name))
    found = re.search(r'{[^{}]*"type":"Accepted"[^{}]*}', text)
    return found[0] if found else ""


def deep_job(name: str, depth: int) -> str:
    """Return a job whose podTemplate is nested so deep."""
    spec = {
        "model": {"hostPath": {"path": "/srv/model"}, "task": "causal-lm"},
        "data": {"volume": {"hostPath": {"path": "/srv/data"}}, "train": "train.jsonl"},
        "rounds": {"count": 1},
    }
    template = '{"spec":' + '{"a":' * depth + "1" + "}" * depth + "}"
    text = json.dumps(
        {
            "apiVersion": "fedpipe.io/v1alpha1",
            "kind": "FedPipeJob",
            "metadata": {"name": name},
            "spec": spec | {"podTemplate": 0},
        }
    )
    return text.replace('"podTemplate": 0', f'"podTemplate": {template}')


def test_a_fedpipenode_of_the_year_0_does_not_stop_the_start(cluster: Cluster) -> None:
    assert "FedPipeNode hostile-edge-3 cannot be read and is left out: status.observedAt" in cluster.log()
    cluster.submit("beside-the-ancient")
    assert cluster.wait_phase("Succeeded", "beside-the-ancient")["nodes"]["summary"] == "2/2"


def test_a_deep_pod_template_is_invalid_and_stops_nobody(cluster: Cluster) -> None:
    cluster.plane.needs("its own limit of nesting")
    for depth in DEPTHS:
        assert raw(cluster, "POST", cluster.job_path(), deep_job(f"deep-{depth}", depth))[0] == 201
    for depth in DEPTHS:
        name = f"deep-{depth}"
        condition = cluster.wait(name, lambda name=name: raw_condition(cluster, name))
        assert '"reason":"Invalid"' in condition
        assert "spec.podTemplate: nested deeper than 24 levels" in condition
    assert "RecursionError" not in cluster.log()
    cluster.submit("beside-the-deep")
    cluster.wait_phase("Succeeded", "beside-the-deep")
    # Nor do they stop the next start.
    assert cluster.stop_operator() == 0
    cluster.start_operator()
    cluster.submit("after-the-deep")
    cluster.wait_phase("Succeeded", "after-the-deep")
    for depth in DEPTHS:
        assert raw(cluster, "DELETE", cluster.job_path(f"deep-{depth}"))[0] == 200
    for depth in DEPTHS:
        path = cluster.job_path(f"deep-{depth}")
        cluster.wait("gone", lambda path=path: raw(cluster, "GET", path)[0] == 404)


@pytest.mark.parametrize("text", ["[" * 20_000 + "]" * 20_000, "no JSON", '{"spec": 1}', "[]", '"x"', "null"])
def test_annotations_of_the_operator_written_by_somebody_else_stop_nobody(
    cluster: Cluster, text: str
) -> None:
    """kopf keeps its notes in annotations, and a tenant may write them."""
    cluster.plane.needs("annotations that its tenants write")
    forged = {
        f"fedpipe.io/{key}": text
        for key in ("last-handled-configuration", "job_seen", "job_seen.spec", "job_deleted", "touch-dummy")
    }
    name = f"forged-{abs(hash(text)) % 10**8}"
    cluster.submit(name)
    cluster.patch(cluster.job_path(name), {"metadata": {"annotations": forged}})
    cluster.submit(f"beside-{name}")
    cluster.wait_phase("Succeeded", f"beside-{name}")
    assert cluster.operator is not None
    assert cluster.operator.poll() is None
    cluster.plane.request(
        "PATCH", cluster.job_path(name), {"metadata": {"annotations": None}}, "application/merge-patch+json"
    )
    for one in (name, f"beside-{name}"):
        cluster.plane.request("DELETE", cluster.job_path(one))
    cluster.wait("gone", lambda: cluster.job(name) is None)


def test_a_spec_larger_than_an_annotation_gets_its_status_and_goes(cluster: Cluster) -> None:
    matrices = [f"encoder.{number}.{'x' * 100}" for number in range(5000)]
    adapter = {"ranks": {"min": 2, "max": 4}, "selection": {"mode": "list", "matrices": matrices}}
    # Without nodes it waits; with them it ends at its first plan, as the model has no such matrices.
    nowhere = {"selector": {"matchLabels": {"site": "nowhere"}}}
    cluster.submit("large", adapter=adapter, nodes=nowhere)
    cluster.wait("accepted", lambda: cluster.condition("Accepted", "large")[0] == "True")
    cluster.patch(cluster.job_path("large"), {"spec": {"suspend": True}})
    cluster.wait_phase("Suspended", "large")
    cluster.plane.request("DELETE", cluster.job_path("large"))
    cluster.wait("gone", lambda: cluster.job("large") is None)
