# SPDX-License-Identifier: Apache-2.0
"""`spec.tracking` on a real API server: a Pod of the job's namespace sends rounds to TensorBoard and MLflow."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedpipe_operator.kube.views import TRACKER, own_pod_name
from kube.cluster import Cluster, taking
from kube.controlplane import ControlPlane
from kube.test_kube_access import token_of

VOLUME = {"persistentVolumeClaim": {"claimName": "events", "path": "team"}}


@pytest.fixture(scope="module")
def away() -> str:
    """Where no server listens, and the operator of all tests here allows one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture(scope="module")
def cluster(
    control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory, away: str
) -> Iterator[Cluster]:
    """Two nodes, kubelets and a running operator, for all tests here."""
    one = Cluster(control_plane, "tracking", tmp_path_factory.mktemp("tracking"))
    for name in ("edge-1", "edge-2"):
        one.add_node(name)
    with one.running("--tracking-allow", away):
        yield one


def tracker(cluster: Cluster, job: str) -> dict[str, Any] | None:
    return cluster.pods().get(own_pod_name(job, TRACKER))


def scalars(directory: Path, name: str) -> list[int]:
    """Return the rounds of a measurement, as TensorBoard reads them."""
    return [event.step for event in EventAccumulator(str(directory)).Reload().Scalars(name)]


def test_rounds_are_in_event_files_and_the_pod_ends(cluster: Cluster, away: str) -> None:
    cluster.submit("events", tracking={"tensorBoard": True, "volume": VOLUME})
    cluster.wait("tracked", lambda: cluster.condition("Tracked", "events")[0] == "True", 120)
    assert cluster.condition("Tracked", "events")[1:] == (
        "RoundsTracked", "claim events/team/tensorboard_runs/events"
    )  # fmt: skip
    assert cluster.status("events")["phase"] == "Succeeded"
    written = cluster.directory / "output/team/tensorboard_runs/events"
    assert scalars(written, "round/loss") == [0, 1, 2, 3]
    assert scalars(written, "trainLoss/tracking-edge-2") == [1, 2, 3]
    pod = tracker(cluster, "events")
    assert pod
    assert pod["status"]["phase"] == "Succeeded"
    assert [reason for reason, _ in cluster.events("events")].count("RoundsTracked") == 1
    # The Pod may be cleaned away: all is done, so none is made again.
    cluster.plane.request(
        "DELETE", f"/api/v1/namespaces/{cluster.namespace}/pods/{own_pod_name('events', TRACKER)}"
    )
    cluster.stop_operator()
    cluster.start_operator("--tracking-allow", away)
    cluster.submit("later")
    cluster.wait_phase("Succeeded", "later")
    assert tracker(cluster, "events") is None
    cluster.plane.request("DELETE", cluster.job_path("events"))
    cluster.wait("it is gone", lambda: cluster.job("events") is None)


def test_a_server_that_is_away_is_named_and_the_job_goes_on(cluster: Cluster, away: str) -> None:
    cluster.submit("alone", tracking={"mlflow": {"uri": away}})
    cluster.wait("named", lambda: cluster.condition("Tracked", "alone")[1] == "TrackingFailed", 120)
    message = cluster.condition("Tracked", "alone")[2]
    assert f"spec.tracking.mlflow.uri: {away} cannot be used" in message
    assert "\n" not in message
    cluster.wait_phase("Succeeded", "alone")
    assert cluster.condition("Ready", "alone")[0] == "True"


REFUSED = {
    "files": ({"mlflow": {"uri": "file:///srv/runs"}}, "spec.tracking.mlflow.uri: must be http(s)://"),
    "metadata": (
        {"mlflow": {"uri": "http://169.254.169.254/latest"}},
        "spec.tracking.mlflow.uri: this cluster allows not that server; its administrator adds it to",
    ),
    "nowhere": ({"tensorBoard": True}, "spec.tracking.volume: required by tensorBoard in a cluster"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_administrator_does_not_allow_is_refused(cluster: Cluster, name: str) -> None:
    tracking, message = REFUSED[name]
    cluster.submit(name, tracking=tracking)
    cluster.wait("refused", lambda: cluster.condition("Accepted", name)[:2] == ("False", "Invalid"))
    assert cluster.condition("Accepted", name)[2].startswith(message)
    assert tracker(cluster, name) is None


def test_a_tracker_reads_the_rounds_of_its_job_and_no_adapter(cluster: Cluster) -> None:
    tracking = {"tensorBoard": True, "volume": VOLUME}
    cluster.submit(
        "busy",
        tracking=tracking,
        rounds={"count": 500, "localSteps": 2, "minUpdates": 2},
        podTemplate=taking(0.5),
    )
    cluster.wait(
        "its Pod runs",
        lambda: ((tracker(cluster, "busy") or {}).get("status") or {}).get("phase") == "Running",
        120,
    )
    pod = tracker(cluster, "busy")
    assert pod
    token = token_of(cluster, pod)
    code, body = cluster.dial("/v1/rounds?after=-1", token)
    assert code == 200, body
    assert cluster.dial("/v1/rounds?after=x", token)[0] == 400
    for path in ("/v1/adapter", "/v1/job"):
        assert cluster.dial(path, token)[0] == 401
    cluster.patch(cluster.job_path("busy"), {"spec": {"suspend": True}})
    cluster.wait_phase("Suspended", "busy")
    cluster.plane.request("DELETE", cluster.job_path("busy"))
    cluster.wait("its Pods are gone", lambda: tracker(cluster, "busy") is None, 60)
