# SPDX-License-Identifier: Apache-2.0
"""Writing a FedPipeNode: what is applied, what is left to others, and how failures are reported."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedpipe_agent.probe import status
from fedpipe_agent.probe.publish import Cluster, Publisher, PublishError
from fedpipe_agent.probe.reading import Reading
from fedpipe_api.base import UserError
from fedpipe_api.node import Capacity, FedPipeNodeStatus
from fedpipe_api.precisions import Precision
from nvml import apiserver, golden


@pytest.fixture
def api(tmp_path: Path) -> Iterator[apiserver.ApiServer]:
    with apiserver.serve(tmp_path) as serving:
        yield serving


def reported() -> FedPipeNodeStatus:
    return status.build(Reading(), golden.CPU, now=golden.NOW)


def test_the_object_is_created_with_its_node_as_owner_and_then_reported_on(api: apiserver.ApiServer) -> None:
    publisher = Publisher(api.cluster())
    publisher.write(reported())
    assert [(method, path.partition("?")[0]) for method, path, _ in api.requests] == [
        ("GET", apiserver.PATH),
        ("PATCH", apiserver.PATH),
        ("PATCH", f"{apiserver.PATH}/status"),
    ]
    owner = {"apiVersion": "v1", "kind": "Node", "name": apiserver.NODE, "uid": apiserver.UID}
    assert api.requests[1][2] == {
        "apiVersion": "fedpipe.io/v1alpha1",
        "kind": "FedPipeNode",
        "metadata": {"name": apiserver.NODE, "ownerReferences": [owner]},
    }
    assert FedPipeNodeStatus.model_validate(api.writes[0]) == reported()
    publisher.write(reported())
    assert len(api.requests) == 4
    assert api.requests[3][2]["metadata"]["resourceVersion"] == "2"


def test_a_deleted_object_comes_back(api: apiserver.ApiServer) -> None:
    publisher = Publisher(api.cluster())
    publisher.write(reported())
    api.node = None
    publisher.write(reported())
    assert api.node is not None
    assert api.node["status"]["deviceSummary"] == "cpu"


def test_an_object_of_an_earlier_node_of_this_name_gets_its_new_owner(api: apiserver.ApiServer) -> None:
    Publisher(api.cluster()).write(reported())
    assert api.node is not None
    api.node["metadata"]["ownerReferences"][0]["uid"] = "of-the-node-before"
    Publisher(api.cluster()).load()
    assert api.node["metadata"]["ownerReferences"][0]["uid"] == apiserver.UID


def test_precisions_verified_by_the_operator_are_left_to_it(api: apiserver.ApiServer) -> None:
    publisher = Publisher(api.cluster())
    publisher.write(reported())
    api.prove("nf4", seconds=0.25)
    publisher.write(reported())
    # The first try ran into the operator's write, the second leaves its entry out.
    conflicted, written = api.writes[-2:]
    assert [entry["precision"] for entry in conflicted["precisions"]] == ["fp32", "bf16", "int8", "nf4"]
    assert [entry["precision"] for entry in written["precisions"]] == ["fp32", "bf16", "int8"]
    assert [(support.precision, support.seconds) for support in publisher.verified] == [(Precision.NF4, 0.25)]
    assert api.node is not None
    assert next(e for e in api.node["status"]["precisions"] if e["precision"] == "nf4")["verified"]


def test_a_declared_capacity_keeps_its_own_precisions_beside_what_the_operator_proved(
    api: apiserver.ApiServer,
) -> None:
    publisher = Publisher(api.cluster())
    publisher.write(reported())
    api.prove("nf4", seconds=0.25)
    publisher.load()
    capacity = Capacity(device="cpu", precisions=(Precision.FP32,))
    declared = status.build(None, golden.CPU, now=golden.NOW, capacity=capacity, verified=publisher.verified)
    publisher.write(declared)
    assert [entry["precision"] for entry in api.writes[-1]["precisions"]] == ["fp32"]
    assert api.node is not None
    assert api.node["status"]["precisionSummary"] == "fp32"


def test_only_the_probe_s_own_conditions_are_taken_up_again(api: apiserver.ApiServer) -> None:
    publisher = Publisher(api.cluster())
    publisher.write(reported())
    assert api.node is not None
    other = api.node["status"]["conditions"][0] | {"type": "Eligible"}
    api.node["status"]["conditions"].append(other)
    assert Publisher(api.cluster()).load() == reported()


@pytest.mark.parametrize(
    ("code", "reason"),
    [(403, "Forbidden"), (409, "Conflict"), (500, "InternalError")],
)
def test_refusals_are_named(api: apiserver.ApiServer, code: int, reason: str) -> None:
    api.refuse = (code, reason)
    with pytest.raises(PublishError, match="by the test") as caught:
        Publisher(api.cluster()).write(reported())
    assert caught.value.reason == reason


def test_a_server_that_is_not_there_is_named(api: apiserver.ApiServer) -> None:
    cluster = api.cluster()
    gone = Cluster("http://127.0.0.1:1", cluster.token, None)
    with pytest.raises(PublishError, match=r"127\.0\.0\.1:1: .*refused") as caught:
        Publisher(gone).write(reported())
    assert caught.value.reason == "Unreachable"


@pytest.mark.parametrize("text", ["", "no.token", "a.!!!.c", "a.e30.c", "a.bnVsbA.c"])
def test_a_token_without_a_node_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "token"
    path.write_text(text)
    with pytest.raises(PublishError) as caught:
        Publisher(Cluster("http://unused", path, None)).load()
    assert caught.value.reason == "NoNodeClaim"
    path.unlink()
    with pytest.raises(PublishError, match="No such file") as caught:
        Publisher(Cluster("http://unused", path, None)).load()
    assert caught.value.reason == "NoToken"


def test_the_cluster_of_a_pod() -> None:
    found = Cluster.of_pod({"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "6443"})
    assert found.url == "https://[fd00::1]:6443"
    with pytest.raises(UserError, match="--once"):
        Cluster.of_pod({})
