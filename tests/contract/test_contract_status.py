# SPDX-License-Identifier: Apache-2.0
"""Status as the operator and the probe write it: through the subresource, keyed, shown by kubectl."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from contract.documents import documents, schema
from contract.manifests import job
from fedpipe_api.job import FedPipeJob, FedPipeJobStatus
from fedpipe_api.node import FedPipeNode, FedPipeNodeStatus
from kube.controlplane import ControlPlane

JOBS = "/apis/fedpipe.io/v1alpha1/namespaces/default/fedpipejobs"
NODES = "/apis/fedpipe.io/v1alpha1/fedpipenodes"
STRICT = "fieldValidation=Strict"

JOB_STATUS = FedPipeJobStatus.model_validate(
    {
        "observedGeneration": 1,
        "phase": "Training",
        "rounds": "7/30",
        "round": 7,
        "nodes": {"matched": 7, "planned": 6, "ready": 6, "summary": "6/6"},
        "metric": {"name": "accuracy", "value": 0.86149, "best": 0.86149, "bestRound": 7},
        "metricSummary": "accuracy=0.861",
        "eta": "41m",
        "conditions": [
            {
                "type": "Ready",
                "status": "False",
                "reason": "RoundOpen",
                "lastTransitionTime": "2026-01-01T00:00:00Z",
            }
        ],
        "nodeTable": [{"name": "edge-1", "state": "training", "precision": "nf4"}],
        "history": [{"round": 7, "updates": 6, "seconds": 171.0, "bytesUp": 3, "bytesDown": 4}],
    }
)

NODE = {
    "apiVersion": "fedpipe.io/v1alpha1",
    "kind": "FedPipeNode",
    "metadata": {"name": "ip-10-0-0-1.edge.internal"},
}

NODE_STATUS = FedPipeNodeStatus.model_validate(
    {
        "source": "nvml",
        "observedAt": "2026-01-01T00:00:00Z",
        "deviceSummary": "NVIDIA T4",
        "memorySummary": "15Gi",
        "freeSummary": "14Gi",
        "precisionSummary": "int8,nf4",
        "conditions": [
            {
                "type": "Ready",
                "status": "True",
                "reason": "GpuReady",
                "lastTransitionTime": "2026-01-01T00:00:00Z",
            }
        ],
    }
)


@pytest.fixture
def stored(control_plane: ControlPlane) -> Any:
    """The path of a job and of a node in the API server."""
    status, answer = control_plane.request("POST", f"{JOBS}?{STRICT}", job({"metadata.name": "shown"}))
    assert status == 201, answer
    status, answer = control_plane.request("POST", f"{NODES}?{STRICT}", NODE)
    assert status == 201, answer
    paths = (f"{JOBS}/shown", f"{NODES}/{NODE['metadata']['name']}")
    yield paths
    for path in paths:
        control_plane.request("DELETE", path)


def put_status(control_plane: ControlPlane, path: str, status: dict[str, Any]) -> tuple[int, Any]:
    _, document = control_plane.request("GET", path)
    return control_plane.request("PUT", f"{path}/status?{STRICT}", document | {"status": status})


def test_kubectl_shows_how_it_goes(control_plane: ControlPlane, stored: tuple[str, str]) -> None:
    for path, status in zip(stored, (JOB_STATUS, NODE_STATUS), strict=True):
        code, answer = put_status(control_plane, path, status.to_dict())
        assert code == 200, answer
    header, row = control_plane.kubectl("get", "fpj", "shown").stdout.splitlines()
    assert header.split() == ["NAME", "PHASE", "REASON", "ROUND", "NODES", "METRIC", "BEST", "ETA", "AGE"]
    assert row.split()[:8] == [
        "shown",
        "Training",
        "RoundOpen",
        "7/30",
        "6/6",
        "accuracy=0.861",
        "0.8615",
        "41m",
    ]
    header, row = control_plane.kubectl("get", "fpn", stored[1].rpartition("/")[2]).stdout.splitlines()
    assert header.split() == ["NAME", "DEVICE", "MEMORY", "FREE", "PRECISIONS", "SEEN", "READY"]
    assert row.split()[1:6] == ["NVIDIA", "T4", "15Gi", "14Gi", "int8,nf4"]
    assert row.split()[7] == "True"
    assert "shown" in control_plane.kubectl("get", "fedpipe", "-n", "default").stdout


def test_status_is_written_through_the_subresource_only(control_plane: ControlPlane, stored: Any) -> None:
    _, document = control_plane.request("GET", stored[0])
    control_plane.request("PUT", stored[0], document | {"status": JOB_STATUS.to_dict()})
    assert "status" not in control_plane.request("GET", stored[0])[1]
    spec = document["spec"] | {"suspend": True}
    control_plane.request(
        "PUT", f"{stored[0]}/status", document | {"spec": spec, "status": JOB_STATUS.to_dict()}
    )
    after = FedPipeJob.model_validate(control_plane.request("GET", stored[0])[1])
    assert after.spec.suspend is False
    assert after.status == JOB_STATUS


def test_keyed_lists_refuse_duplicates(control_plane: ControlPlane, stored: Any) -> None:
    twice = JOB_STATUS.to_dict()
    twice["conditions"] *= 2
    code, answer = put_status(control_plane, stored[0], twice)
    assert code == 422
    assert "status.conditions[1]: Duplicate value" in answer["message"]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(status=documents(schema("fedpipejobs")["properties"]["status"]))
def test_any_job_status_survives(control_plane: ControlPlane, stored: Any, status: Any) -> None:
    """What pydantic writes, the API server stores, and pydantic reads back."""
    written = FedPipeJobStatus.model_validate(status)
    code, answer = put_status(control_plane, stored[0], written.to_dict())
    assert code == 200, answer["message"]
    assert FedPipeJob.model_validate(answer).status == written


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(status=documents(schema("fedpipejobs")["properties"]["status"]))
def test_job_status_round_trips(status: Any) -> None:
    model = FedPipeJobStatus.model_validate(status)
    assert FedPipeJobStatus.model_validate(model.to_dict()) == model
    assert FedPipeJobStatus.model_validate_json(model.to_json()) == model


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(status=documents(schema("fedpipenodes")["properties"]["status"]))
def test_node_round_trips(status: Any) -> None:
    model = FedPipeNode.model_validate(NODE | {"status": status})
    assert FedPipeNode.model_validate(model.to_dict()) == model
    assert FedPipeNode.model_validate_json(model.to_json()) == model
