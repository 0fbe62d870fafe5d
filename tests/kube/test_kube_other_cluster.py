# SPDX-License-Identifier: Apache-2.0
"""A store that was brought from another cluster: nothing is removed from it before somebody says so."""

import sqlite3
from pathlib import Path

from kube.cluster import Cluster
from kube.controlplane import ControlPlane


def records(cluster: Cluster) -> list[tuple[str, str]]:
    """Return job and key of every record of the operator's ledger; the operator does not run."""
    found = sqlite3.connect(cluster.directory / "store/ledger.sqlite")
    try:
        return found.execute("SELECT job, key FROM record ORDER BY seq").fetchall()
    finally:
        found.close()


def test_a_store_from_another_cluster_stops_the_operator_untouched(
    control_plane: ControlPlane, tmp_path: Path
) -> None:
    cluster = Cluster(control_plane, "moved", tmp_path)
    try:
        cluster.add_node("edge-1")
        cluster.start_operator()
        first = cluster.submit()
        uid = first["metadata"]["uid"]
        cluster.wait("a status", lambda: cluster.status().get("phase"))
        assert cluster.stop_operator() == 0
        before = records(cluster)
        assert {job for job, _ in before} == {uid}

        # What a restored cluster has: a job of the same name that is another one.
        cluster.patch(cluster.job_path("tickets"), {"metadata": {"finalizers": None}})
        cluster.plane.request("DELETE", cluster.job_path("tickets"))
        cluster.wait("gone", lambda: cluster.job() is None)
        second = cluster.submit()
        assert second["metadata"]["uid"] != uid
        cluster.launch_operator()
        assert cluster.operator is not None
        assert cluster.operator.wait(60) == 2
        (line,) = [line for line in cluster.log().splitlines() if "is in this cluster" in line]
        assert line.startswith("fedpipe-operator: none of the 1 jobs in the store")
        assert "operator.dropUnknownJobs=true" in line
        assert "Traceback" not in cluster.log()
        assert records(cluster) == before

        cluster.start_operator("--drop-unknown-jobs")
        cluster.wait("a status", lambda: cluster.status().get("phase"))
        assert cluster.stop_operator() == 0
        assert {job for job, _ in records(cluster)} == {second["metadata"]["uid"]}
    finally:
        cluster.tear_down()
