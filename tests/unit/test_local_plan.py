# SPDX-License-Identifier: Apache-2.0
"""`fedpipe plan`, as printed."""

import gzip
import json
import re
from pathlib import Path

import pytest
import yaml
from transformers import AutoConfig, AutoModel

from agent_fixtures import save_tiny_model
from fedpipe_operator.cli import main
from fedpipe_operator.local import manifest, plan
from fedpipe_operator.local.plan import describe

pytestmark = pytest.mark.slow

JOB = {
    "apiVersion": "fedpipe.io/v1alpha1",
    "kind": "FedPipeJob",
    "metadata": {"name": "words"},
    "spec": {
        "model": {
            "hostPath": {"path": "/model"},
            "task": "sequence-classification",
            "labels": ["animal", "colour", "other"],
        },
        "data": {"volume": {"hostPath": {"path": "/data"}}, "train": "train.jsonl", "maxLength": 32},
        "rounds": {"count": 2, "localSteps": 4, "batchSize": 4, "deadline": "5m"},
        "nodes": {"min": 2, "max": 3},
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of which a plan reads the configuration, the tokenizer and the names of the weights."""
    return save_tiny_model("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture
def planned(tmp_path, monkeypatch, capsys, model):
    """Run `fedpipe plan` over nodes with the given capacities and changes of parts of the spec."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "240")
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "x", "label": "other"}\n' * 50)

    def run(*nodes, **changes):
        job = json.loads(json.dumps(JOB))
        for part, fields in changes.items():
            job["spec"][part] = job["spec"].get(part, {}) | fields
        named = [{"name": f"edge-{number}", "data": "data"} | node for number, node in enumerate(nodes)]
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
        (tmp_path / "fleet.yaml").write_text(yaml.safe_dump({"model": "model", "nodes": named}))
        monkeypatch.setattr("sys.argv", ["fedpipe", "plan", "job.yaml", "--fleet", "fleet.yaml"])
        status = main()
        reported = capsys.readouterr()
        return status, reported.out.splitlines(), reported.err

    return run


def test_every_node_of_the_fleet_is_accounted_for(planned):
    status, lines, _ = planned({"memory": "2Gi"}, {"memory": "2Gi"}, {"memory": "100Mi"}, {}, {})
    assert status == 0
    assert lines[0].split()[:3] == ["node", "precision", "batch"]
    assert [line.split()[0] for line in lines[1:4]] == ["edge-0", "edge-1", "edge-2"]
    assert "does not fit: needs" in lines[3]
    assert lines[4].startswith("round deadline 5m · slowest planned node ")
    assert lines[5] == (
        "20,960 parameters; weights to adapt: query, value "
        "(peft's choice for bert; spec.adapter.modules names others)"
    )
    assert lines[6:] == [
        "edge-0, edge-1: ranks: the highest ranks that spec.adapter.ranks allows fit at this precision",
        "edge-3, edge-4: left out: spec.nodes.max is 3",
    ]


def test_fewer_local_steps_are_reported_with_their_reason(planned):
    slow = {"memory": "2Gi", "speed": 0.001}
    _, lines, _ = planned(slow, slow, rounds={"localSteps": 1_000_000, "deadline": "10s"})
    assert lines[-1].startswith("edge-0, edge-1: time: 1000000 local steps do not fit the deadline of 10s; ")


def test_a_deadline_that_no_node_meets_is_named(planned):
    slow = {"memory": "2Gi", "speed": 0.001, "linkRate": "1k"}
    status, lines, error = planned(slow, slow, rounds={"deadline": "1s"})
    assert status == 2
    assert "it may take 900ms of the round's 1s" in lines[1]
    assert error.startswith("job.yaml: spec.nodes.min: 2 nodes are required but 0 fit. ")
    assert "raise rounds.deadline" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"maxLength": 65}}, "spec.data.maxLength: 65, but the model has 64 positions; lower it"),
        (
            {"adapter": {"modules": ["nope"]}},
            "spec.adapter.modules: no linear layer of 'bert' ends with 'nope'",
        ),
    ],
)
def test_what_the_model_has_no_room_for_is_a_mistake_in_the_job(planned, changes, message):
    status, lines, error = planned({}, {}, **changes)
    assert (status, lines) == (2, [])
    assert error.removeprefix("fedpipe: ") == f"job.yaml: {message}\n"


def test_a_mistake_in_the_data_is_named_by_its_line(planned, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "train.jsonl").write_text('{"text": "x", "label": "vault"}\n')
    status, lines, error = planned({}, {"data": "bad"})
    assert (status, lines) == (2, [])
    assert "bad/train.jsonl:1: field 'label' is not one of the job's 3 labels: animal, colour, other" in error
    assert "vault" not in error
    assert error.count("\n") == 1


def test_a_precision_slower_than_float32_is_said_with_the_factor(planned, monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")  # a processor that only emulates bf16
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    status, lines, _ = planned({"precisions": ["bf16"]}, {"precisions": ["fp32", "bf16"]})
    assert status == 0
    assert [line.split()[1] for line in lines[1:3]] == ["bf16", "fp32"]
    assert re.fullmatch(r"edge-0: ranks: .*; bf16 is \d+(\.\d)? times slower than fp32 there", lines[-2])
    assert "slower" not in lines[-1]


def test_kernels_are_run_only_where_a_node_leaves_out_float32(planned, monkeypatch):
    asked = []
    monkeypatch.setattr(plan, "describe", lambda local, verify: asked.append(verify) or describe(local))
    planned({"precisions": ["nf4", "fp32"]}, {})
    planned({"precisions": ["nf4"]}, {})
    assert asked == [False, True]


def test_rows_are_counted_as_an_agent_counts_them(planned, tmp_path):
    (tmp_path / "zipped").mkdir()
    with gzip.open(tmp_path / "zipped" / "train.jsonl.gz", "wb") as file:
        file.write(b'{"text": "x", "label": "other"}\n' * 1000)
    planned({"data": "zipped"}, {"data": "zipped"}, data={"train": "train.jsonl.gz", "evaluationShare": 0.1})
    found = describe(manifest.read(Path("job.yaml"), Path("fleet.yaml")))
    assert [(each.samples, each.evaluation_samples) for each in found] == [(900, 100)] * 2
    assert found[0].model.parameters == parameters_of(tmp_path / "model")


def parameters_of(model):
    """Return how many parameters the base of the model has, by its real modules."""
    config = AutoConfig.from_pretrained(model)
    return sum(each.numel() for each in AutoModel.from_config(config).parameters())
