# SPDX-License-Identifier: Apache-2.0
"""`fedpipe.Client` and the commands for a cluster's jobs, against a real API server with a running operator."""

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

import fedpipe
from fedpipe_api.base import UserError
from fedpipe_api.job import Phase
from fedpipe_operator import cli
from fedpipe_operator.kube import client as client_module
from kube.cluster import Cluster
from kube.controlplane import ControlPlane


@pytest.fixture(scope="module")
def cluster(control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes, kubelets and a running operator, for all tests here."""
    one = Cluster(control_plane, "client", tmp_path_factory.mktemp("client"))
    for name in ("edge-1", "edge-2"):
        one.add_node(name)
    with one.running():
        yield one


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "POLL_SECONDS", 0.2)


@pytest.fixture
def kubeconfig(cluster: Cluster, tmp_path: Path) -> Path:
    """A person's, whose context has the jobs' namespace."""
    config = yaml.safe_load(cluster.plane.kubeconfig.read_text())
    config["contexts"][0]["context"]["namespace"] = cluster.namespace
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def client(kubeconfig: Path) -> fedpipe.Client:
    return fedpipe.Client(kubeconfig=kubeconfig)


def manifest(cluster: Cluster, name: str, **spec: Any) -> dict[str, Any]:
    base = {
        "model": {"hostPath": {"path": "/m"}, "task": "sequence-classification", "labels": ["a", "b", "c"]},
        "data": {"volume": {"hostPath": {"path": "/d"}}, "train": "train.jsonl"},
        "nodes": {"selector": {"matchLabels": {"site": cluster.name}}, "min": 2},
        "rounds": {"count": 3, "localSteps": 2, "minUpdates": 2},
        "adapter": {"ranks": {"min": 2, "max": 4}},
    }
    return {"metadata": {"name": name}, "spec": base | spec}


def fedpipe_command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["fedpipe", *map(str, arguments)])
    return cli.main()


def test_a_program_submits_a_job_and_follows_it(cluster: Cluster, client: fedpipe.Client) -> None:
    assert client.namespace == cluster.namespace, "the context's"
    job = client.submit(manifest(cluster, "program"))
    assert job.metadata.uid
    seen = list(client.watch("program"))
    assert seen[-1].status
    assert seen[-1].status.phase is Phase.SUCCEEDED
    assert all(a.status != b.status for a, b in pairwise(seen))
    assert "program" in [one.metadata.name for one in client.jobs()]
    with pytest.raises(UserError, match=r"job program in namespace client-jobs: .*already exists \(409\)"):
        client.submit(manifest(cluster, "program"))
    with pytest.raises(UserError, match=r"job nobody in namespace client-jobs: .*not found \(404\)"):
        client.get("nobody")


def test_a_job_is_applied_suspended_and_goes_on(cluster: Cluster, client: fedpipe.Client) -> None:
    wanted = manifest(cluster, "applied", rounds={"count": 60, "localSteps": 2, "minUpdates": 2})
    client.apply(wanted)
    cluster.wait("a round", lambda: cluster.status("applied").get("round", 0) >= 1, 60)
    client.suspend("applied")
    cluster.wait_phase("Suspended", "applied")
    wanted["spec"]["rounds"]["count"] = 61
    client.apply(wanted)
    assert client.get("applied").spec.suspend, "what the manifest does not name is left"
    client.resume("applied")
    assert cluster.wait_phase("Succeeded", "applied")["rounds"] == "61/61"
    wanted["spec"]["model"]["labels"] = ["x", "y"]
    with pytest.raises(UserError, match=r"model cannot be changed.* \(422\)"):
        client.apply(wanted)


def test_submit_prints_each_change_and_ends_as_the_job_does(
    cluster: Cluster, kubeconfig: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(manifest(cluster, "submitted")))
    assert fedpipe_command(monkeypatch, "submit", path, "--kubeconfig", kubeconfig) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "Succeeded  3/3" in lines[-1]
    assert len(lines) == len(set(lines))
    assert fedpipe_command(monkeypatch, "watch", "submitted", "--json", "--kubeconfig", kubeconfig) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert json.loads(line)["status"]["phase"] == "Succeeded"
    assert fedpipe_command(monkeypatch, "get", "jobs", "--kubeconfig", kubeconfig) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:5] == ["NAME", "PHASE", "REASON", "ROUND", "NODES"]
    [row] = [row for row in rows if row.startswith("submitted ")]
    assert row.split()[1:5] == ["Succeeded", "RoundsCompleted", "3/3", "2/2"]
    # As kubectl shows them.
    cluster.plane.needs("kubectl")
    shown = cluster.plane.kubectl("get", "fpj", "submitted", "-n", cluster.namespace).stdout.splitlines()
    assert shown[0].split() == head.split()


def test_a_job_that_fails_or_cannot_be_run_ends_watch_with_its_status(
    cluster: Cluster, kubeconfig: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    client = fedpipe.Client(cluster.namespace, kubeconfig)
    client.submit(manifest(cluster, "refused", tracking={"mlflow": {"uri": "http://nowhere"}}))
    assert fedpipe_command(monkeypatch, "watch", "refused", "--kubeconfig", kubeconfig) == 2
    said = capsys.readouterr().err
    assert said.startswith("job refused: spec.tracking.mlflow.uri: this cluster allows no server")
    assert said.count("\n") == 1
    client.submit(
        manifest(
            cluster, "late", activeDeadlineSeconds=1, rounds={"count": 4000, "localSteps": 2, "minUpdates": 2}
        )
    )
    assert fedpipe_command(monkeypatch, "watch", "late", "--kubeconfig", kubeconfig) == 1
    assert "Failed  0/4000  not done 1 s after the start" in capsys.readouterr().out


MISTAKES = [
    ("a: 1", "job.yaml: metadata: "),
    ("metadata: {name: x}\nspec: {rounds: 3}", "job.yaml: spec"),
    ("- 1", "job.yaml: not a YAML mapping"),
    ("{", "job.yaml:1: not YAML"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES)
def test_a_mistake_in_a_file_is_one_line_before_anything_is_sent(
    text: str, message: str, kubeconfig: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    for command in ("apply", "submit"):
        assert fedpipe_command(monkeypatch, command, path, "--kubeconfig", kubeconfig) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1


def test_other_mistakes_are_one_line_too(
    cluster: Cluster, kubeconfig: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = tmp_path / "job.yaml"
    other = manifest(cluster, "other")
    other["metadata"]["namespace"] = "elsewhere"
    path.write_text(yaml.safe_dump(other))
    stranger = cluster.plane.kubeconfig_for("stranger", cluster.token(cluster.namespace, "default"))
    dead = tmp_path / "dead"
    dead.write_text(kubeconfig.read_text().replace(cluster.plane.url, "https://127.0.0.1:1"))
    for arguments, message in (
        (
            ("apply", path, "-n", cluster.namespace, "--kubeconfig", kubeconfig),
            "is elsewhere, not client-jobs",
        ),
        (("logs", "nobody", "--kubeconfig", kubeconfig), "not found (404)"),
        (("watch", "x", "-n", cluster.namespace, "--kubeconfig", stranger), "forbidden"),
        (("get", "jobs", "-n", cluster.namespace, "--kubeconfig", stranger), "forbidden"),
        (("get", "jobs", "-n", "A/B", "--kubeconfig", kubeconfig), "--namespace: must be the name"),
        (("suspend", "x", "--kubeconfig", tmp_path / "absent"), "kubeconfig: "),
        (("resume", "x", "--kubeconfig", dead), "the API server does not answer"),
        (("get", "adapter", "x", "--out", tmp_path, "--kubeconfig", kubeconfig), "exists already"),
    ):
        assert fedpipe_command(monkeypatch, *arguments) == 2, arguments
        said = capsys.readouterr().err
        assert message in said, (arguments, said)
        assert said.count("\n") == 1, said


def test_kubectl_finds_the_plugin() -> None:
    plugin = Path(sys.executable).with_name("kubectl-fedpipe")
    done = subprocess.run([plugin, "--help"], capture_output=True, text=True, check=True)
    assert {"apply", "submit", "watch", "logs", "suspend", "resume", "get"} <= set(done.stdout.split())
