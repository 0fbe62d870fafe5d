# SPDX-License-Identifier: Apache-2.0
import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.numpy import save as dump_tensors
from safetensors.torch import load as load_tensors

from agent_fixtures import Coordinator, global_adapter, refusal, registered, save_tiny_model, write_rows
from fedpipe_agent import cli
from fedpipe_api.job import Precision, Task
from fedpipe_api.lora.format import HEAD, LORA_A, LORA_B
from fedpipe_api.lora.methods import Start
from fedpipe_api.wire import (
    Assignment,
    AssignmentKind,
    NodePlan,
)

STOP = Assignment(kind=AssignmentKind.STOP, reason="done")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {kind: save_tiny_model(kind, tmp_path_factory.mktemp(kind)) for kind in ("bert", "gpt2")}


@pytest.fixture(autouse=True)
def unchanged_process(monkeypatch):
    """Put the environment and the signal handlers back that the command sets."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    environment = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(environment)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def arguments(coordinator, model, directory, precisions=("fp32",)):
    (directory / "token").write_text("secret")
    capacity = {"threads": 1, "precisions": precisions, "device": "box"}
    (directory / "capacity.json").write_text(json.dumps(capacity))
    return [
        "train",
        *("--coordinator", coordinator.url),
        *("--model", str(model)),
        *("--data", str(directory)),
        *("--token-file", str(directory / "token")),
        *("--capacity", str(directory / "capacity.json")),
    ]


def plan(ranks, precision=Precision.FP32, **more):
    return NodePlan(
        precision=precision,
        ranks=ranks,
        **{
            "micro_batch": 4,
            "accumulation": 2,
            "local_steps": 3,
            "predicted_bytes": 0,
            "predicted_step_seconds": 0,
            "predicted_round_seconds": 0,
            "limited_by": "time",
            **more,
        },
    )


def shape_of(model, task=Task.SEQUENCE_CLASSIFICATION):
    from fedpipe_agent.train import model as base
    from fedpipe_agent.train.shape import read_shape

    config = base.read_config(base.Source(str(model)), registered(task).model, 0)
    return read_shape(config, task)


def train_assignment(number, ranks, adapter=None, **more):
    planned = more.pop("plan", None) or plan(ranks)
    return Assignment(
        kind=AssignmentKind.TRAIN, round=number, plan=planned, adapter=adapter, learning_rate=1e-2, **more
    )


def test_a_whole_job(models, tmp_path):
    shape = shape_of(models["bert"])
    write_rows(tmp_path / "train.jsonl", 40)
    ranks = {matrix.name: 2 for matrix in shape.matrices[:4]}
    tensors = global_adapter(shape, 4)
    with Coordinator(registered()) as coordinator:
        blob = coordinator.add(dump_tensors(tensors))
        coordinator.assignments = [
            Assignment(kind=AssignmentKind.PROFILE, plan=plan(ranks), profile_steps=2, importance=True),
            train_assignment(1, ranks, evaluate=True),
            train_assignment(2, ranks, blob, evaluate=True),
            train_assignment(2, ranks, blob, evaluate=True),
            train_assignment(3, ranks, blob, evaluate=True, start=Start.TRUNCATE),
            train_assignment(4, {}, blob, plan=plan(ranks, Precision.NF4), start=Start.FRESH),
            Assignment(kind=AssignmentKind.EVALUATE, round=4, plan=plan(ranks), adapter=blob),
            STOP,
        ]
        assert cli.main(arguments(coordinator, models["bert"], tmp_path, ("fp32", "nf4"))) == 0

        (registration,) = coordinator.registrations
        assert registration.model == shape
        assert (registration.samples, registration.evaluation_samples) == (36, 4)
        assert registration.device.name == "box"
        assert [(k.precision, k.usable) for k in registration.device.kernels] == [
            (Precision.FP32, True),
            (Precision.NF4, True),
        ]

        (profile,) = coordinator.profiles
        assert profile.scores.keys() == {matrix.name for matrix in shape.matrices}
        assert profile.micro_batch == 4
        assert profile.peak_bytes > registration.device.overhead / 2

        evaluations = {}
        for evaluation in coordinator.evaluations:
            evaluations.setdefault(evaluation.round, []).append(evaluation)
        assert list(evaluations) == [0, 1, 2, 4]
        assert all(e.samples == e.tokens == 4 for found in evaluations.values() for e in found)
        # The same global adapter, at the start of a split round, of a truncated one, and all frozen.
        losses = [e.loss_sum for number in (1, 2, 4) for e in evaluations[number]]
        assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-3)

        assert [manifest.steps for manifest, _ in coordinator.updates] == [3] * 5
        # Each says what it is a change of.
        starts = [(manifest.round, manifest.adapter) for manifest, _ in coordinator.updates]
        assert starts == [(1, None), (2, blob.digest), (2, blob.digest), (3, blob.digest), (4, blob.digest)]
        splits = [True, True, True, False, False]  # by the rule they started by, as assigned
        for (manifest, body), split in zip(coordinator.updates, splits, strict=True):
            assert hashlib.sha256(body).hexdigest() == manifest.digest
            assert manifest.samples == 36
            update = load_tensors(body)
            assert update.keys() == {m + part for m in ranks for part in (LORA_A, LORA_B)} | {
                "head.classifier.weight",
                "head.classifier.bias",
            }
            types = {n.startswith(HEAD): tensor.dtype for n, tensor in update.items()}
            assert types == {True: torch.float32, False: torch.bfloat16 if split else torch.float32}
        # Work that is assigned again gives the same bytes.
        assert coordinator.updates[1][1] == coordinator.updates[2][1]
        states = {p.state for p in coordinator.progress}
        assert {"loading", "evaluating", "training", "uploading"} <= states
        assert "failed" not in states


def test_a_causal_language_model(models, tmp_path):
    shape = shape_of(models["gpt2"], Task.CAUSAL_LM)
    rows = [{"prompt": f"cat {a}", "completion": f"{a} red"} for a in ("one", "two", "three", "dog") * 5]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ranks = {matrix.name: 2 for matrix in shape.matrices}
    with Coordinator(registered(Task.CAUSAL_LM)) as coordinator:
        coordinator.assignments = [
            train_assignment(1, ranks, plan=plan(ranks, local_steps=30), evaluate=True),
            STOP,
        ]
        assert cli.main(arguments(coordinator, models["gpt2"], tmp_path)) == 0
        (evaluation,) = coordinator.evaluations
        assert (evaluation.samples, evaluation.tokens, evaluation.correct) == (2, 6, None)
        ((manifest, body),) = coordinator.updates
        assert manifest.train_loss < evaluation.loss_sum / evaluation.tokens
        assert not any(name.startswith(HEAD) for name in load_tensors(body))


def test_a_round_closed_meanwhile_is_left(models, tmp_path):
    shape = shape_of(models["bert"])
    write_rows(tmp_path / "train.jsonl")
    ranks = {matrix.name: 2 for matrix in shape.matrices}
    with Coordinator(registered(), wanted=False) as coordinator:
        coordinator.assignments = [
            train_assignment(1, ranks, plan=plan(ranks, local_steps=100_000)),
            STOP,
        ]
        assert cli.main(arguments(coordinator, models["bert"], tmp_path)) == 0
        assert coordinator.updates == []


def test_a_measured_link_rate_is_registered_and_paces_nothing(models, tmp_path):
    write_rows(tmp_path / "train.jsonl")
    with Coordinator(registered()) as coordinator:
        coordinator.assignments = [STOP]
        # A declared rate of one byte per second would keep the registration for minutes.
        assert cli.main([*arguments(coordinator, models["bert"], tmp_path), "--link-rate", "1"]) == 0
        (registration,) = coordinator.registrations
    assert registration.device.link_rate == 1


@pytest.mark.parametrize("rate", ["0", "fast", "-5"])
def test_a_link_rate_that_is_none_is_refused(capfd, rate):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--link-rate", rate])
    assert caught.value.code == 2
    assert "argument --link-rate: " in capfd.readouterr().err


def test_the_deadline_shortens_the_work(models, tmp_path):
    shape = shape_of(models["bert"])
    write_rows(tmp_path / "train.jsonl")
    ranks = {matrix.name: 2 for matrix in shape.matrices}
    with Coordinator(registered()) as coordinator:
        coordinator.assignments = [
            train_assignment(1, ranks, plan=plan(ranks, local_steps=100_000), remaining_seconds=3.0),
            STOP,
        ]
        assert cli.main(arguments(coordinator, models["bert"], tmp_path)) == 0
        ((manifest, _),) = coordinator.updates
        assert 1 <= manifest.steps < manifest.planned_steps == 100_000


def test_a_blob_that_is_gone_leads_to_the_next_assignment(models, tmp_path):
    write_rows(tmp_path / "train.jsonl")
    with Coordinator(registered()) as coordinator:
        blob = coordinator.add(b"gone")
        coordinator.faults["blobs"] = [lambda _: refusal(404, "BlobUnknown")]
        coordinator.assignments = [train_assignment(2, {}, blob), STOP]
        assert cli.main(arguments(coordinator, models["bert"], tmp_path)) == 0
        assert coordinator.updates == []


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda d: None, "train.jsonl: no such file"),
        (lambda d: (d / "train.jsonl").write_text(""), "train.jsonl: the file is empty"),
        (lambda d: (d / "train.jsonl").write_text('{"label": 1}\n'), "train.jsonl:1: no field 'text'"),
        (
            lambda d: (d / "train.jsonl").write_text('{"text": "", "label": 9}\n'),
            "train.jsonl:1: field 'label' is a number, not one of",
        ),
    ],
)
def test_a_mistake_in_the_data_is_one_line_here_and_there(models, tmp_path, capfd, prepare, message):
    prepare(tmp_path)
    with Coordinator(registered()) as coordinator:
        assert cli.main(arguments(coordinator, models["bert"], tmp_path)) == 2
        failed = coordinator.progress[-1]
    assert failed.state == "failed"
    assert message in failed.message
    line = capfd.readouterr().err.splitlines()[-1]
    assert line == f"fedpipe-agent: {failed.message}"


def test_a_path_that_is_no_model_is_one_line_here_and_there(tmp_path, capfd):
    write_rows(tmp_path / "train.jsonl")
    with Coordinator(registered()) as coordinator:
        assert cli.main(arguments(coordinator, tmp_path, tmp_path)) == 2
        assert "not a model: it has no config.json" in coordinator.progress[-1].message


def test_another_failure_is_exit_1_and_reported(models, tmp_path):
    shape = shape_of(models["bert"])
    write_rows(tmp_path / "train.jsonl")
    tensors = global_adapter(shape, 4)
    tensors["head.classifier.bias"] = np.full(3, np.nan, np.float32)
    with Coordinator(registered()) as coordinator:
        blob = coordinator.add(dump_tensors(tensors))
        coordinator.assignments = [train_assignment(3, {}, blob)]
        assert cli.main(arguments(coordinator, models["bert"], tmp_path)) == 1
        failed = coordinator.progress[-1]
    assert (failed.state, failed.kind, failed.round) == ("failed", AssignmentKind.TRAIN, 3)
    assert failed.message == "global adapter: tensor head.classifier.bias is not finite"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--coordinator": "localhost:1"}, "--coordinator localhost:1: not a URL"),
        ({"--token-file": "/no/token"}, "--token-file /no/token: no such file"),
        ({"--capacity": "/no/capacity"}, "/no/capacity: No such file"),
    ],
)
def test_mistakes_in_the_arguments(tmp_path, capfd, changes, message):
    (tmp_path / "token").write_text("secret")
    given = {
        "--coordinator": "http://localhost:1",
        "--model": "bert",
        "--data": str(tmp_path),
        "--token-file": str(tmp_path / "token"),
        **changes,
    }
    assert cli.main(["train", *(part for pair in given.items() for part in pair)]) == 2
    assert message in capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"memory": -1}', "capacity.json: memory: -1 is negative"),
        ('{"precisions": ["fp7"]}', "capacity.json: precisions[0]: Input should be"),
        ('{"memry": 1}', "capacity.json: memry: unknown field"),
        ("{", "capacity.json: not JSON"),
        ("[" * 30_000, "capacity.json: not JSON: "),
        ('{"memory": "5Gi", "memory": "6Gi"}', "capacity.json: not JSON: memory is given twice"),
        (" " * 70_000, "capacity.json: larger than 65536 bytes"),
    ],
)
def test_mistakes_in_the_capacity_file(tmp_path, capfd, text, message):
    (tmp_path / "token").write_text("secret")
    (tmp_path / "capacity.json").write_text(text)
    given = ["--coordinator", "http://localhost:1", "--model", "bert", "--data", str(tmp_path)]
    given += ["--token-file", str(tmp_path / "token"), "--capacity", str(tmp_path / "capacity.json")]
    assert cli.main(["train", *given]) == 2
    reported = capfd.readouterr().err
    assert message in reported
    assert reported.count("\n") == 1


def test_the_command_without_a_subcommand_says_how(capfd):
    assert cli.main([]) == 2
    assert cli.main(["--help"]) == 0
    assert "fedpipe-agent train|probe" in capfd.readouterr().out


def test_sigterm_ends_it_cleanly_in_the_middle_of_training(models, tmp_path):
    shape = shape_of(models["bert"])
    write_rows(tmp_path / "train.jsonl")
    work = tmp_path / "work"
    work.mkdir()
    ranks = {matrix.name: 2 for matrix in shape.matrices}
    with Coordinator(registered()) as coordinator:
        coordinator.assignments = [train_assignment(1, ranks, plan=plan(ranks, local_steps=1_000_000))]
        agent = subprocess.Popen(
            [sys.executable, "-m", "fedpipe_agent.cli", *arguments(coordinator, models["bert"], tmp_path)],
            env={**os.environ, "TMPDIR": str(work), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 120
        while not any(p.state == "training" for p in coordinator.progress):
            assert time.monotonic() < deadline
            assert agent.poll() is None
            time.sleep(0.05)
        begin = time.monotonic()
        agent.send_signal(signal.SIGTERM)
        _, said = agent.communicate(timeout=20)
        assert agent.returncode == 0, said
        assert time.monotonic() - begin < 10
    assert "Traceback" not in said
    assert list(work.iterdir()) == []
