# SPDX-License-Identifier: Apache-2.0
"""What goes wrong in a cluster: a killed operator, vanished nodes, evicted Pods, an API server away."""

import os
import signal
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from fedpipe_api.names import child_name
from kube.cluster import Cluster, taking
from kube.controlplane import ControlPlane
from kube.gate import Gate
from kube.proxy import Proxy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

numbers = count()
NODES = ("edge-1", "edge-2", "edge-3")
ROUNDS: dict[str, Any] = {"count": 6, "localSteps": 2, "minUpdates": 2, "deadline": "5m"}


@pytest.fixture
def cluster(control_plane: ControlPlane, tmp_path: Path) -> Iterator[Cluster]:
    """Three nodes and kubelets; the operator is the test's to start."""
    one = Cluster(control_plane, f"fault-{next(numbers)}", tmp_path)
    for name in NODES:
        one.add_node(name)
    one.start_kubelet()
    try:
        yield one
    finally:
        one.tear_down()


def names(cluster: Cluster) -> list[str]:
    assert cluster.kubelet is not None
    return sorted(cluster.kubelet.created)


@pytest.mark.timeout(900)
def test_sigkill_in_every_phase_gives_the_same_adapter(cluster: Cluster, tmp_path: Path) -> None:
    """The agents stand still at a gate while the operator is killed, so every kill meets its phase."""
    assert cluster.kubelet is not None
    rounds = ROUNDS | {"count": 3, "minUpdates": 3}
    cluster.start_operator()
    cluster.submit("calm", rounds=rounds, nodes=all_nodes(cluster))
    calm = cluster.wait_phase("Succeeded", "calm", 200)
    calm_bytes = adapter_of(cluster, "calm")
    gate = Gate(tmp_path / "gate")
    here = {f"{cluster.name}-{name}" for name in NODES}
    first = min(here)

    def meet(step: str, nodes: set[str] = here) -> None:
        cluster.wait(f"agents at {step}", lambda: gate.at(step) >= nodes, 200)

    def kill() -> None:
        cluster.kill_operator()
        cluster.start_operator()

    cluster.submit("killed", rounds=rounds, nodes=all_nodes(cluster, opened="yes"), podTemplate=gate.template)
    kill()  # perhaps before it has seen the job at all
    cluster.wait_phase("Pending", "killed", 200)
    kill()
    for name in here:
        cluster.patch(f"/api/v1/nodes/{name}", {"metadata": {"labels": {"opened": "yes"}}})
    cluster.wait_phase("Planning", "killed", 200)
    kill()  # while Pods are made
    meet("register")
    kill()
    gate.open("register")
    cluster.wait_phase("Profiling", "killed", 200)
    meet("profile")
    kill()
    gate.open("profile")
    for number in (1, 2, 3):
        meet(f"train-{number}")
        cluster.wait_phase("Training", "killed", 200)
        kill()  # the round is open
        gate.open(f"train-{number}")
        meet(f"upload-{number}")
        kill()  # half of every update is sent
        gate.open(f"upload-{number}", first)
        meet(f"answered-{number}", {first})
        kill()  # one is counted
        gate.open(f"upload-{number}")
        meet(f"answered-{number}")
        kill()  # all are: the round is being closed, aggregated and followed by the next
    status = cluster.wait_phase("Succeeded", "killed", 200)
    assert status["adapter"]["digest"] == calm["adapter"]["digest"]
    assert adapter_of(cluster, "killed") == calm_bytes
    mine = [name for name in names(cluster) if name.startswith("killed-")]
    assert len(mine) == len(set(mine)) == len(NODES), "agents go on through every kill, in the same Pods"
    cluster.wait("the agents have ended", lambda: not cluster.kubelet or not cluster.kubelet.agents())
    cluster.plane.request("DELETE", cluster.job_path("killed"))
    cluster.wait("no Pod is left", lambda: not any(name.startswith("killed-") for name in cluster.pods()))


def all_nodes(cluster: Cluster, **labels: str) -> dict[str, Any]:
    """Return a spec.nodes that wants every one of them."""
    return {"selector": {"matchLabels": {"site": cluster.name} | labels}, "min": len(NODES)}


def adapter_of(cluster: Cluster, name: str) -> bytes:
    """Return the finished adapter as the operator gives it out."""
    code, found = cluster.adapter(name, cluster.reader_token())
    assert code == 200, found
    return found


def test_a_job_deleted_while_the_operator_is_dead_leaves_nothing(cluster: Cluster) -> None:
    cluster.start_operator()
    cluster.submit(rounds=ROUNDS | {"count": 500}, podTemplate=taking(0.2))
    cluster.wait_phase("Training")
    cluster.kill_operator()
    cluster.plane.request("DELETE", cluster.job_path("tickets"))
    # The documented way to let go of a job without its operator.
    cluster.patch(cluster.job_path("tickets"), {"metadata": {"finalizers": None}})
    assert cluster.job() is None
    # It was the only job of the store, which could be another cluster's as well.
    cluster.start_operator("--drop-unknown-jobs")
    text = (cluster.get("/metrics") or b"").decode()
    assert 'job="tickets"' not in text
    assert not list((cluster.directory / "store" / "blobs").glob("??/*"))


def test_a_vanished_node_does_not_hold_the_round(cluster: Cluster) -> None:
    cluster.start_operator()
    cluster.submit(rounds=ROUNDS | {"count": 10}, podTemplate=taking(0.5))
    cluster.wait("a round", lambda: cluster.status().get("round", 0) >= 1)
    gone = f"{cluster.name}-edge-2"
    cluster.drop_node(gone)
    status = cluster.wait_phase("Succeeded", seconds=60)
    assert status["round"] == 10
    assert any(gone in text for reason, text in cluster.events() if reason == "AgentLost")
    assert {p["spec"]["nodeName"] for p in cluster.pods().values()} == {
        f"{cluster.name}-{n}" for n in NODES
    } - {gone}


def test_an_evicted_pod_comes_back(cluster: Cluster) -> None:
    assert cluster.kubelet is not None
    cluster.start_operator()
    cluster.submit(rounds=ROUNDS | {"count": 500}, podTemplate=taking(0.3))
    cluster.wait("a round", lambda: cluster.status().get("round", 0) >= 1)
    node = f"{cluster.name}-edge-1"
    cluster.kubelet.evict(node)
    cluster.wait("lost", lambda: cluster.status()["nodes"]["ready"] == 2)
    assert any("Evicted" in text for reason, text in cluster.events() if reason == "AgentLost")
    before = cluster.status()["round"]
    cluster.wait("rounds go on", lambda: cluster.status()["round"] > before + 1)
    cluster.wait("back", lambda: cluster.status()["nodes"]["summary"] == "3/3", 60)


def test_a_killed_agent_comes_back_in_another_pod(cluster: Cluster) -> None:
    assert cluster.kubelet is not None
    cluster.start_operator()
    cluster.submit(rounds=ROUNDS | {"count": 500}, podTemplate=taking(0.3))
    cluster.wait("a round", lambda: cluster.status().get("round", 0) >= 1)
    node = f"{cluster.name}-edge-1"
    cluster.kubelet.agents()[node].kill()

    def row() -> dict[str, Any]:
        return next(row for row in cluster.status()["nodeTable"] if row["name"] == node)

    cluster.wait("lost", lambda: row()["state"] == "lost")
    cluster.wait("back", lambda: cluster.status()["nodes"]["summary"] == "3/3", 60)
    cluster.wait("why", lambda: row().get("message", "").startswith("before, its Pod failed (Error): "))
    assert [name for name in names(cluster) if node in name] == 2 * [child_name("tickets", node)]


def test_without_quorum_it_waits_with_a_reason(cluster: Cluster) -> None:
    assert cluster.kubelet is not None
    cluster.start_operator()
    cluster.submit(rounds=ROUNDS | {"count": 500, "minUpdates": 3}, podTemplate=taking(0.3))
    cluster.wait("a round", lambda: cluster.status().get("round", 0) >= 1)
    cluster.drop_node(f"{cluster.name}-edge-1")
    cluster.wait("why", lambda: cluster.condition("Stalled")[:2] == ("True", "QuorumLost"))
    assert "of 3 required" in cluster.status()["message"]


def test_a_hung_agent_is_distinguished_from_a_working_one(cluster: Cluster) -> None:
    """SIGSTOP: the Pod runs, the agent is silent; rounds go on without it after a while."""
    assert cluster.kubelet is not None
    cluster.periods["fedpipe_operator.engine.silence.SILENCE_SECONDS"] = 15.0
    cluster.start_operator()
    cluster.submit(rounds=ROUNDS | {"count": 2000}, podTemplate=taking(0.5))
    cluster.wait("a round", lambda: cluster.status().get("round", 0) >= 1)
    hung = cluster.kubelet.agents()[f"{cluster.name}-edge-3"]
    os.kill(hung.pid, signal.SIGSTOP)  # type: ignore[attr-defined]
    cluster.wait("lost", lambda: cluster.status()["nodes"]["ready"] == 2, 120)
    lost = [text for reason, text in cluster.events() if reason == "AgentLost"]
    assert any("no sign of life" in text for text in lost)
    before = cluster.status()["round"]
    cluster.wait("rounds go on", lambda: cluster.status()["round"] > before + 1)
    os.kill(hung.pid, signal.SIGCONT)  # type: ignore[attr-defined]
    cluster.wait("back", lambda: cluster.status()["nodes"]["summary"] == "3/3", 60)


@pytest.fixture
def proxy(control_plane: ControlPlane, cluster: Cluster) -> Iterator[Proxy]:
    """What the operator takes for the API server."""
    one = Proxy(control_plane)
    cluster.api_url = one.url
    yield one
    one.mode = "pass"
    if cluster.operator is not None and cluster.operator.poll() is None:
        cluster.stop_operator()
    one.stop()


def test_the_api_server_away_for_a_minute_costs_no_round(cluster: Cluster, proxy: Proxy) -> None:
    cluster.start_operator()
    cluster.submit(rounds=ROUNDS | {"count": 2000}, podTemplate=taking(0.5))
    cluster.wait("a round", lambda: cluster.status().get("round", 0) >= 1)

    def done() -> int:
        text = (cluster.get("/metrics") or b"").decode()
        line = next(
            (line for line in text.splitlines() if line.startswith("fedpipe_job_rounds{") and "done" in line),
            " 0",
        )
        return int(float(line.rsplit(" ", 1)[1]))

    before = done()
    proxy.mode = "away"
    time.sleep(60)
    token = cluster.token(cluster.own, "prometheus")
    assert cluster.metrics(token)[0] == 503, "a caller whose review fails is refused"
    proxy.mode = "pass"
    meanwhile = cluster.wait("metrics", done)
    print(f"{meanwhile - before} rounds in 60 s without the API server")
    assert meanwhile > before + 20
    cluster.wait("status follows", lambda: cluster.status()["round"] >= meanwhile, 60)
    cluster.patch(cluster.job_path("tickets"), {"spec": {"suspend": True}})
    cluster.wait("Pods are gone", lambda: not cluster.pods(), 90)


def test_a_storm_of_conflicts_ends_in_success(cluster: Cluster, proxy: Proxy) -> None:
    cluster.start_operator()
    proxy.mode = "conflict"
    cluster.submit(rounds=ROUNDS, podTemplate=taking(0.3))
    cluster.wait_phase("Succeeded", seconds=150)
    assert proxy.conflicts > 10
    assert len(set(names(cluster))) == len(names(cluster)) == len(NODES)


def test_a_frozen_watch_is_noticed(cluster: Cluster, proxy: Proxy) -> None:
    cluster.periods["fedpipe_operator.kube.handlers.SILENT_SECONDS"] = 15.0
    cluster.start_operator()
    cluster.submit(rounds=ROUNDS | {"count": 2000}, podTemplate=taking(0.5))
    cluster.wait("a round", lambda: cluster.status().get("round", 0) >= 1)
    proxy.mode = "frozen"
    cluster.patch(cluster.job_path("tickets"), {"spec": {"suspend": True}})
    time.sleep(5)
    assert cluster.status()["phase"] != "Suspended"
    proxy.mode = "pass"  # for new connections; the frozen ones stay so
    cluster.wait_phase("Suspended", seconds=150)
    cluster.wait("Pods are gone", lambda: not cluster.pods(), 60)
