# SPDX-License-Identifier: Apache-2.0
"""`fedpipe-agent describe` prints what `fedpipe-agent train` would register with."""

import json
import signal

import pytest

from agent_fixtures import LABELS, Coordinator, registered, save_tiny_model, write_rows
from fedpipe_agent import cli
from fedpipe_api.job import Task
from fedpipe_api.wire import Assignment, AssignmentKind, Registration


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Keep to the CPU, and put back what the command sets."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def files(tmp_path):
    """A job's manifest, a capacity and a node's data, all in one directory."""
    job = registered()
    manifest = {
        "metadata": {"name": "tickets"},
        "spec": {
            "model": {
                "hostPath": {"path": "/models/base"},
                "task": Task.SEQUENCE_CLASSIFICATION,
                "labels": list(LABELS),
            },
            "data": {"volume": {"hostPath": {"path": "/data"}}, "train": "train.jsonl", "maxLength": 16},
            "rounds": {"count": 1, "localSteps": 1},
            "seed": job.seed,
        },
    }
    (tmp_path / "job.json").write_text(json.dumps(manifest))
    (tmp_path / "capacity.json").write_text('{"threads": 1, "precisions": ["nf4", "fp32"], "device": "box"}')
    (tmp_path / "token").write_text("secret")
    write_rows(tmp_path / "train.jsonl", 40)
    return tmp_path


def describe(model, directory, *more, data=None):
    return cli.main(
        [
            *("describe", "--job", str(directory / "job.json"), "--model", str(model)),
            *("--data", *(map(str, data or [directory])), *more),
        ]
    )


def test_it_is_what_an_agent_registers_with(model, files, capfd):
    capacity = str(files / "capacity.json")
    with Coordinator(registered()) as coordinator:
        coordinator.assignments = [Assignment(kind=AssignmentKind.STOP, reason="done")]
        arguments = ["--coordinator", coordinator.url, "--model", str(model), "--data", str(files)]
        arguments += ["--token-file", str(files / "token"), "--capacity", capacity]
        assert cli.main(["train", *arguments]) == 0
        (sent,) = coordinator.registrations
    capfd.readouterr()
    assert describe(model, files, "--verify", "--capacity", capacity) == 0
    (line,) = capfd.readouterr().out.splitlines()
    found = Registration.model_validate_json(line)
    assert (found.version, found.model) == (sent.version, sent.model)
    assert (found.samples, found.evaluation_samples) == (sent.samples, sent.evaluation_samples) == (36, 4)
    moving = {"kernels": (), "free_memory": 0, "overhead": 0}
    assert found.device.model_copy(update=moving) == sent.device.model_copy(update=moving)
    verdicts = [[(kernel.precision, kernel.usable) for kernel in r.device.kernels] for r in (found, sent)]
    assert verdicts[0] == verdicts[1]
    assert found.device.overhead == pytest.approx(sent.device.overhead, rel=0.5)


def test_one_line_for_each_directory_and_its_capacity(model, files, capfd):
    other = files / "other"
    other.mkdir()
    write_rows(other / "train.jsonl", 10)
    (files / "small.yaml").write_text("memory: 1Gi\nprecisions: [int8]\n")
    capacities = [str(files / name) for name in ("capacity.json", "small.yaml")]
    assert describe(model, files, "--capacity", *capacities, data=[files, other]) == 0
    first, second = (Registration.model_validate_json(line) for line in capfd.readouterr().out.splitlines())
    assert (first.samples, second.samples) == (36, 9)
    assert [kernel.precision for kernel in first.device.kernels] == ["nf4", "fp32"]
    assert [kernel.precision for kernel in second.device.kernels] == ["int8"]
    assert second.device.free_memory == 2**30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"job.json": "{"}, "job.json: not JSON"),
        ({"job.json": '{"spec": {}}'}, "job.json: metadata: required, but not given"),
        ({"train.jsonl": '{"text": "a", "label": "vault"}\n'}, "train.jsonl:1: field 'label' is not one of"),
        ({"train.jsonl": "\n"}, "train.jsonl: no rows"),
    ],
)
def test_a_mistake_is_one_line(model, files, capfd, change, message):
    for name, text in change.items():
        (files / name).write_text(text)
    assert describe(model, files) == 2
    said = capfd.readouterr()
    assert message in said.err
    assert "vault" not in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_what_the_model_cannot_take_is_one_line(model, files, capfd):
    job = json.loads((files / "job.json").read_text())
    job["spec"]["data"]["maxLength"] = 65
    (files / "job.json").write_text(json.dumps(job))
    assert describe(model, files) == 2
    assert "spec.data.maxLength: 65, but the model has 64 positions; lower it" in capfd.readouterr().err
    assert describe(files, files) == 2
    assert "not a model: it has no config.json" in capfd.readouterr().err


def test_as_many_capacities_as_directories(model, files, capfd):
    capacity = str(files / "capacity.json")
    assert describe(model, files, "--capacity", capacity, capacity) == 2
    assert "--capacity: 2 files for 1 directories of --data; give as many" in capfd.readouterr().err
