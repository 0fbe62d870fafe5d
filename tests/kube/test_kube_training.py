# SPDX-License-Identifier: Apache-2.0
"""The first sample, applied with kubectl, trains for real: operator, API server and agents as processes."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from agent_fixtures import LABELS, save_tiny_model, write_rows
from fedpipe_operator.kube.get import unpack
from kube.cluster import Cluster
from kube.controlplane import REPOSITORY, ControlPlane
from kube.forked_operator import PROGRAM
from kube.kubelet import Process, start_process
from kube.pod_process import ENVIRONMENT, local_arguments

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

AGENT = Path(sys.executable).with_name("fedpipe-agent")


def test_the_first_sample_trains_for_real(control_plane: ControlPlane, tmp_path: Path) -> None:
    control_plane.needs("kubectl")
    model = save_tiny_model("bert", tmp_path / "model")
    nodes = ("edge-1", "edge-2", "edge-3")
    cluster = Cluster(control_plane, "training", tmp_path)
    cluster.program = PROGRAM
    for seed, node in enumerate(nodes):
        cluster.add_node(node)
        data = tmp_path / "data" / f"training-{node}"
        data.mkdir(parents=True)
        write_rows(data / "train.jsonl", 200, seed)

    def agent(pod: dict[str, Any], directory: Path) -> Process:
        node = pod["metadata"]["annotations"]["fedpipe.io/node"]
        paths = {"/model": str(model), "/data": str(tmp_path / "data" / node)}
        arguments = local_arguments(pod, directory, paths)
        environment = os.environ | ENVIRONMENT | {"HF_HUB_OFFLINE": "1", "HOME": str(directory)}
        return start_process([str(AGENT), "train", *arguments], directory, environment)

    sample = yaml.safe_load((REPOSITORY / "crds" / "samples" / "01-quickstart.yaml").read_text())
    sample["metadata"]["namespace"] = cluster.namespace
    sample["spec"]["model"] = {
        "hostPath": {"path": "/srv/model"}, "task": "sequence-classification", "labels": list(LABELS)
    }  # fmt: skip
    sample["spec"]["data"]["maxLength"] = 16
    sample["spec"]["nodes"]["selector"] = {"matchLabels": {"site": "training"}}
    sample["spec"]["rounds"] |= {"count": 6, "localSteps": 8}
    sample["spec"]["optimizer"]["learningRate"] = 0.02
    try:
        cluster.start_kubelet(agent)
        cluster.start_operator()
        applied = cluster.plane.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(sample))
        assert applied.returncode == 0, applied.stderr
        status = cluster.wait_phase("Succeeded", "quickstart", 300)
        line = cluster.plane.kubectl("get", "fpj", "quickstart", "-n", cluster.namespace).stdout
        print(line)
        assert "Succeeded" in line
        accuracies = [entry["accuracy"] for entry in status["history"]]
        print(accuracies)
        assert accuracies[-1] > accuracies[0]
        assert status["metric"]["best"] > 0.5
        # Nodes that other tests made are listed too, with why they were left out.
        rows = [row for row in status["nodeTable"] if row["name"].startswith("training-")]
        assert {row["precision"] for row in rows} <= {"fp32", "bf16", "int8", "nf4"}
        code, body = cluster.adapter("quickstart", cluster.reader_token())
        assert code == 200, body
        unpack(body, tmp_path / "adapter")
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert config["task_type"] == "SEQ_CLS"
        pods = cluster.pods().values()
        cluster.wait(
            "agents ended by themselves", lambda: not cluster.kubelet or not cluster.kubelet.agents()
        )
        assert len(pods) == 3
    finally:
        print(cluster.log())
        for log in tmp_path.glob("pods/*/log"):
            print(log.read_text()[-1500:])
        cluster.tear_down()
