# SPDX-License-Identifier: Apache-2.0
"""Pods whose agent failed: who is replaced, when, and what people read of it."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from fedpipe_api.names import child_name
from fedpipe_operator.engine.records import AgentLost
from fedpipe_operator.engine.state import apply
from fedpipe_operator.kube.failed_pods import FailedPods
from fedpipe_operator.kube.reconcile import reconcile
from fedpipe_operator.kube.views import pod_view
from kube.cluster import Cluster
from kube.controlplane import ControlPlane
from kube.gate import Gate
from kube.kubelet import Process, start_process
from kube.looks import fleet, look, state_of
from kube.objects import NOW, job, pod, stamp
from kube.pod_process import ENVIRONMENT, local_arguments, stand_in_agent

AGENT = Path(sys.executable).with_name("fedpipe-agent")


def exited(code: int, *, said: str = "", phase: str = "Failed", at: float = NOW - 4000, **more: Any) -> Any:
    """A Pod of node a whose agent has ended."""
    reason = "OOMKilled" if code == 137 else "Error"
    ended = {"exitCode": code, "reason": reason, "message": said, "finishedAt": stamp(at)}
    return pod(
        "a", phase=phase, containerStatuses=[{"name": "agent", "state": {"terminated": ended}}], **more
    )


def test_an_agent_that_refuses_its_data_is_not_tried_again_before_somebody_acts() -> None:
    one = job()
    refused = exited(2, said="INFO\nfedpipe-agent: /data/train.jsonl:3: no field 'text'")
    state = state_of(one, ("a", "b"), ("b",))
    found = look(one, fleet("a", "b"), [refused, pod("b")], state)
    assert found.lost == {
        "a": "its Pod failed (Error): /data/train.jsonl:3: no field 'text'; once that is right, delete Pod "
        + refused["metadata"]["name"]
    }
    apply(state, AgentLost(sequence=9, node="a", reason=found.lost["a"]), NOW)
    known = look(one, fleet("a", "b"), [refused, pod("b")], state)
    assert known.settled
    assert known.again is None
    for edited in (exited(2, generation="0"), exited(2, template="t0")):
        assert [r.pod.node for r in look(one, fleet("a", "b"), [edited, pod("b")], state).remove] == ["a"]
    assert look(one, fleet("a", "b"), [pod("b")], state).create == ("a",), "somebody deleted it"
    for code in (1, 137):
        again = look(one, fleet("a", "b"), [exited(code), pod("b")], state)
        assert [r.pod.node for r in again.remove] == ["a"]


def test_a_sidecar_that_still_runs_does_not_hide_that_the_agent_has_ended() -> None:
    one = job()
    state = state_of(one, ("a", "b"), ("b",))
    ended = exited(1, said="fedpipe-agent: out of memory", phase="Running")
    ended["spec"]["restartPolicy"] = "Never"
    found = look(one, fleet("a", "b"), [ended, pod("b")], state)
    assert found.lost == {"a": "its Pod failed (Error): out of memory"}
    assert [r.pod.node for r in found.remove] == ["a"]
    ended["spec"]["restartPolicy"] = "OnFailure"
    assert not look(one, fleet("a", "b"), [ended, pod("b")], state).remove, "the kubelet restarts it"


def test_pods_that_fail_in_a_row_are_replaced_ever_more_slowly() -> None:
    one, failed = job(), FailedPods()
    state = state_of(one, ("a", "b"), ("b",))

    def pause(created: float, ended: float) -> float | None:
        bodies = [exited(1, at=ended, created=created), pod("b")]
        views = [failed.known(view) for view in map(pod_view, bodies) if view]
        return reconcile(one, fleet("a", "b"), views, state, seen={}, template="t1", now=ended).again

    starts = [NOW - 10000 + 500 * number for number in range(7)]
    pauses = [pause(start, start + 60) for start in starts for _ in range(2)]
    assert pauses[::2] == pauses[1::2] == [10, 20, 40, 80, 160, 300, 300]
    assert pause(NOW - 5000, NOW - 4400) == 10, "this one worked for ten minutes"


def test_the_pod_in_place_of_one_that_was_killed_for_memory_says_so() -> None:
    failed = FailedPods()
    first = pod_view(exited(137, said="INFO"))
    second = pod_view(pod("a", created=NOW, phase="Pending"))
    assert first
    assert second
    why = "its Pod failed (Error): it was killed because it used more memory than it may (OOMKilled)"
    assert failed.known(first).trouble == why
    assert failed.known(second).restarted == f"before, {why}"
    assert failed.known(second).trouble is None


def test_only_an_agent_that_ran_out_of_memory_and_does_not_run_is_said_to_be_killed_for_it() -> None:
    one = job()
    state = state_of(one, ("a", "b"), ("b",))
    assert look(one, fleet("a", "b"), [exited(137), pod("b")], state).killed == {"a"}
    assert look(one, fleet("a", "b"), [exited(1), pod("b")], state).killed == frozenset()
    killed = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
    for now, expected in ({"waiting": {"reason": "CrashLoopBackOff"}}, True), ({"running": {}}, False):
        status = {"name": "agent", "state": now, "lastState": killed}
        view = pod_view(pod("a", phase="Running", containerStatuses=[status]))
        assert view
        assert view.killed is expected
        sidecar = pod_view(pod("a", phase="Running", containerStatuses=[status | {"name": "proxy"}]))
        assert sidecar
        assert not sidecar.killed


def test_an_agent_killed_for_memory_comes_back_with_less_and_finishes(
    control_plane: ControlPlane, tmp_path: Path
) -> None:
    cluster, gate = Cluster(control_plane, "memory", tmp_path), Gate(tmp_path / "gate")
    nodes = [cluster.add_node(f"edge-{number}") for number in (1, 2)]

    def row() -> dict[str, Any]:
        return next((r for r in cluster.status().get("nodeTable", ()) if r["name"] == nodes[0]), {})

    try:
        kubelet = cluster.start_kubelet()
        cluster.start_operator()
        data = {"volume": {"hostPath": {"path": "/srv/data"}}, "train": "train.jsonl", "maxLength": 2048}
        cluster.submit(data=data, podTemplate=gate.template)
        for step in ("register", "profile"):
            gate.open(step)
        # The round needs both updates, and one agent dies of what it was planned.
        cluster.wait("they train", lambda: len(gate.at("train-1")) == 2)
        before = cluster.wait("its plan", lambda: row().get("predictedBytes"))
        kubelet.kill_for_memory(nodes[0])
        cluster.wait("why", lambda: "(OOMKilled)" in row().get("message", ""), 30)
        after = cluster.wait(
            "less", lambda: (row().get("predictedBytes") or before) <= 0.8 * before and row()
        )
        cluster.wait("said", lambda: row().get("message", "").startswith("killed for memory at "), 90)
        assert "; planned again with " in row()["message"]
        assert after["microBatch"] >= 1
        for number in (1, 2, 3):
            gate.open(f"train-{number}")
            gate.open(f"upload-{number}")
        status = cluster.wait_phase("Succeeded")
        assert [known["updates"] for known in status["history"]] == [2, 2, 2]
        assert any(
            "was killed for memory at" in text for reason, text in cluster.events() if reason == "Replanned"
        )
    finally:
        cluster.tear_down()


def test_a_node_without_its_file_is_tried_again_once_its_pod_is_deleted_or_the_job_edited(
    control_plane: ControlPlane, tmp_path: Path
) -> None:
    cluster = Cluster(control_plane, "mistakes", tmp_path)
    nodes = [cluster.add_node(f"edge-{number}") for number in (1, 2, 3)]
    right = {nodes[2]}

    def agent(made: dict[str, Any], directory: Path) -> Process:
        if made["metadata"]["annotations"]["fedpipe.io/node"] in right:
            return stand_in_agent(made, directory)
        arguments = local_arguments(made, directory, {"/model": str(tmp_path), "/data": str(tmp_path)})
        return start_process([str(AGENT), "train", *arguments], directory, os.environ | ENVIRONMENT)

    def row(node: str) -> dict[str, Any]:
        return next((r for r in cluster.status().get("nodeTable", ()) if r["name"] == node), {})

    pods = f"/api/v1/namespaces/{cluster.namespace}/pods"
    first, second = (child_name("tickets", node) for node in nodes[:2])
    try:
        kubelet = cluster.start_kubelet(agent)
        cluster.start_operator()
        cluster.submit(nodes={"selector": {"matchLabels": {"site": "mistakes"}}, "min": 3})
        for node, name in zip(nodes, (first, second), strict=False):
            cluster.wait("lost", lambda node=node: row(node).get("state") == "lost", 30)
            said = f"correct spec.data.train; once that is right, delete Pod {name}"
            cluster.wait("why", lambda node=node, said=said: said in row(node).get("message", ""), 30)
            failures = [text for reason, text in cluster.events() if reason == "AgentFailed" and node in text]
            assert len(failures) == 1, failures
            assert "train.jsonl: no such file" in failures[0]
        assert "train.jsonl: no such file" in cluster.status()["message"]
        assert cluster.condition("Stalled")[0] == "True"
        assert {cluster.pods()[name]["status"]["phase"] for name in (first, second)} == {"Failed"}
        right.update(nodes)
        assert cluster.plane.request("DELETE", f"{pods}/{first}")[0] == 200
        cluster.wait("back", lambda: row(nodes[0]).get("state") not in ("lost", "starting"))
        assert kubelet.created.count(second) == 1, json.dumps(kubelet.created)
        cluster.patch(cluster.job_path("tickets"), {"spec": {"rounds": {"count": 4}}})
        cluster.wait_phase("Succeeded")
        assert sorted(map(kubelet.created.count, (first, second))) == [2, 2]
    finally:
        cluster.tear_down()
