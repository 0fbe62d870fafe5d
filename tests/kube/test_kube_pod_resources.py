# SPDX-License-Identifier: Apache-2.0
"""What agents request: a start before the plan, then what it needs, and what a podTemplate says of it."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedpipe_api.base import parse_quantity
from fedpipe_operator.kube.pod_resources import UNPLANNED, planned, resizes
from fedpipe_operator.kube.views import pod_view
from kube.cluster import Cluster
from kube.controlplane import ControlPlane
from kube.gate import Gate
from kube.looks import PLAN, SHAPE, state_of
from kube.objects import job, pod
from standins.agents import registration

GIB = 2**30
DEVICE = registration(SHAPE).device


def agent_pod(requests: Any, **more: Any) -> Any:
    body = pod("a", **more)
    body["spec"]["containers"] = [{"name": "proxy"}, {"name": "agent", "resources": {"requests": requests}}]
    return pod_view(body)


def state(predicted: int, threads: int = 4, kind: str = "cpu") -> Any:
    made = state_of(job(), ("a",), ("a",), plan=("a",))
    plan = PLAN.model_copy(update={"predicted_bytes": predicted})
    made.plans[2] = made.plans[2].model_copy(update={"nodes": {"a": plan}})
    device = DEVICE.model_copy(update={"threads": threads, "kind": kind})
    made.agents["a"] = made.agents["a"].model_copy(update={"device": device})
    return made


@pytest.mark.parametrize(
    ("predicted", "threads", "cpu", "memory"),
    [(13 * GIB, 16, "8", "15309Mi"), (618 * 2**20, 3, "1500m", "711Mi"), (1, 1, "500m", "1Mi")],
)
def test_a_planned_agent_requests_its_memory_with_a_margin_and_half_its_threads(
    predicted: int, threads: int, cpu: str, memory: str
) -> None:
    plan = PLAN.model_copy(update={"predicted_bytes": predicted})
    device = DEVICE.model_copy(update={"threads": threads})
    assert planned(plan, device) == {"cpu": cpu, "memory": memory}


def test_on_a_gpu_the_plan_says_nothing_of_the_nodes_memory() -> None:
    assert resizes(job(), state(13 * GIB, kind="cuda"), [agent_pod(UNPLANNED)]) == ()


def test_a_running_agent_requests_what_its_plan_needs_and_then_nothing_more() -> None:
    one = state(13 * GIB, threads=4)
    [found] = resizes(job(), one, [agent_pod(UNPLANNED)])
    assert found.requests == {"cpu": "2", "memory": "15309Mi"}
    assert resizes(job(), one, [agent_pod(found.requests)]) == ()
    assert resizes(job(), state_of(job(), ("a",), ("a",)), [agent_pod(UNPLANNED)]) == ()


@pytest.mark.parametrize("more", [{"phase": "Pending"}, {"deleting": True}])
def test_an_agent_that_does_not_run_keeps_its_requests(more: Any) -> None:
    assert resizes(job(), state(13 * GIB), [agent_pod(UNPLANNED, **more)]) == ()


def test_the_same_size_written_otherwise_is_the_same() -> None:
    one = state(int(2 * GIB / 1.15), threads=4)
    [found] = resizes(job(), one, [agent_pod(UNPLANNED)])
    assert found.requests["memory"] == "2048Mi"
    assert resizes(job(), one, [agent_pod({"cpu": "2", "memory": "2Gi"})]) == ()


@pytest.mark.parametrize(
    ("resources", "left"),
    [
        ({"limits": {"memory": "4Gi"}}, {"cpu"}),
        ({"requests": {"cpu": "3"}}, {"memory"}),
        ({"requests": {"cpu": "3"}, "limits": {"memory": "4Gi"}}, set()),
        ({"requests": None}, {"cpu", "memory"}),
    ],
)
def test_what_a_template_says_of_a_resource_stays(resources: Any, left: set[str]) -> None:
    one = job(podTemplate={"spec": {"containers": [{"name": "agent", "resources": resources}]}})
    found = resizes(one, state(13 * GIB), [agent_pod(UNPLANNED)])
    assert set().union(*(resize.requests for resize in found)) == left
    assert resizes(one, state(13 * GIB), [agent_pod({})]) == ()


@pytest.mark.parametrize("spec", [{"containers": "x"}, {"containers": ["x"]}, {"containers": [{"name": 1}]}])
def test_a_template_that_fits_no_pod_is_left_to_those_who_build_pods(spec: Any) -> None:
    one = job(podTemplate={"spec": spec})
    assert resizes(one, state(13 * GIB), [agent_pod(UNPLANNED)]) == ()


@pytest.fixture
def cluster(control_plane: ControlPlane, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    one = Cluster(control_plane, request.param, tmp_path)
    for name in ("edge-1", "edge-2", "edge-3"):
        one.add_node(name)
    with one.running():
        yield one


@pytest.mark.parametrize("cluster", ["resources"], indirect=True)
def test_agents_request_what_their_plans_need_without_a_restart(cluster: Cluster, tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    cluster.submit(podTemplate=gate.template)
    before = cluster.wait("agents run", lambda: requested(cluster))
    assert {size for _, size in before.values()} == {2**30}
    for step in ("register", "profile"):
        gate.open(step)
    cluster.wait("they have work", lambda: len(gate.at("train-1")) == 3)

    def wanted() -> dict[str, tuple[str, int]]:
        sizes = {row["name"]: row.get("predictedBytes", 0) for row in cluster.status()["nodeTable"]}
        return {
            uid: (node, math.ceil(1.15 * sizes[node] / 2**20) * 2**20) for uid, (node, _) in before.items()
        }

    cluster.wait("requests follow the plan", lambda: requested(cluster) == wanted())
    for step in ("train-1", "upload-1", "train-2", "upload-2", "train-3", "upload-3"):
        gate.open(step)
    cluster.wait_phase("Succeeded")


@pytest.mark.parametrize("cluster", ["refusal"], indirect=True)
def test_a_node_whose_pod_is_not_resized_says_why(cluster: Cluster, tmp_path: Path) -> None:
    cluster.plane.needs("LimitRanges")
    least = {"type": "Container", "min": {"memory": "1Gi"}}
    path = f"/api/v1/namespaces/{cluster.namespace}/limitranges"
    cluster.create(path, {"metadata": {"name": "large"}, "spec": {"limits": [least]}})
    gate = Gate(tmp_path / "gate")
    cluster.submit(podTemplate=gate.template)
    for step in ("register", "profile"):
        gate.open(step)

    def messages() -> list[str]:
        return [row.get("message", "") for row in cluster.status().get("nodeTable", ())]

    refused = "its Pod keeps its requests, as it cannot be resized to cpu 500m, memory "
    said = cluster.wait("why", lambda: [m for m in messages() if m.startswith(refused)], 60)
    assert "minimum memory usage per Container is 1Gi, but request is" in said[0]
    assert len(said[0]) < 600


def requested(cluster: Cluster) -> dict[str, tuple[str, int]]:
    """Return (node, bytes) that agents request, by the uid of their Pod, once there are three."""
    found = {}
    for body in cluster.pods().values():
        [agent] = body["spec"]["containers"]
        size = parse_quantity(agent["resources"]["requests"]["memory"])
        found[body["metadata"]["uid"]] = (body["metadata"]["annotations"]["fedpipe.io/node"], size)
    return found if len(found) == 3 else {}
