# SPDX-License-Identifier: Apache-2.0
"""`fedpipe report --prompts`: a run's model answers the user's own prompts, in the terminal and in the report."""

import json

import numpy as np
import pytest
from safetensors.numpy import save

from agent_fixtures import WORDS, save_tiny_model
from fedpipe_agent.train import model as base
from fedpipe_agent.train.shape import read_shape
from fedpipe_api.job import FedPipeJob, Phase
from fedpipe_api.node import Fleet
from fedpipe_api.wire import Blob, NodePlan
from fedpipe_operator.cli import main
from fedpipe_operator.engine.records import (
    AgentRegistered,
    Finished,
    Offered,
    PlanMade,
    RoundAggregated,
    RoundClosed,
    RoundOpened,
    Submitted,
)
from fedpipe_operator.local.directory import RunDirectory, RunRecord
from fedpipe_operator.store import Blobs, Entry, Ledger
from standins.agents import registration

pytestmark = pytest.mark.slow

UID = "8d4f0f6c-0000-4000-8000-000000000000"


def job_of(model, task):
    labels = {"labels": ["a", "b"]} if task == "sequence-classification" else {}
    spec = {
        "model": {"hostPath": {"path": str(model)}, "task": task} | labels,
        "data": {"train": "train.jsonl", "maxLength": 32},
        "rounds": {"count": 1},
    }
    return FedPipeJob.model_validate({"metadata": {"name": "words"}, "spec": spec})


def make_run(root, model, task="causal-lm"):
    """Write what the engine leaves of a job of one round, its adapter of random numbers."""
    job, directory = job_of(model, task), RunDirectory(root)
    fleet = Fleet.model_validate({"nodes": [{"name": "a"}]})
    directory.create(RunRecord(uid=UID, job=job, fleet=fleet, model=str(model)))
    source = base.Source(str(model))
    shape = read_shape(base.read_config(source, job.spec.model, 0), job.spec.model.task, (), source)
    random = np.random.default_rng(0)
    factors = {}
    for matrix in shape.matrices:
        factors[f"{matrix.name}.lora_B"] = random.normal(size=(matrix.rows, 4)).astype(np.float32)
        factors[f"{matrix.name}.lora_A"] = random.normal(size=(4, matrix.columns)).astype(np.float32)
    ledger, blobs = Ledger(directory.store / "ledger.sqlite"), Blobs(directory.store / "blobs")
    incoming = blobs.incoming()
    incoming.write(save(factors))
    digest = incoming.finish()
    blobs.adopt(incoming.path, digest)
    plan = NodePlan(
        precision="fp32", micro_batch=4, accumulation=1, ranks={m.name: 4 for m in shape.matrices},
        local_steps=2, predicted_bytes=1, predicted_step_seconds=1, predicted_round_seconds=2,
        limited_by="ranks",
    )  # fmt: skip
    adapter = Blob(digest=digest, size=incoming.size)
    seen = registration(shape)
    records = [
        Submitted(namespace="default", name="words", generation=1, spec=job.spec),
        Offered(sequence=1, nodes=("a",)),
        AgentRegistered(
            sequence=2, node="a", device=seen.device, samples=9, evaluation_samples=0, model=shape
        ),
        PlanMade(
            version=1, reason="", selected=tuple(plan.ranks), nodes={"a": plan}, left_out={}, considered=("a",)
        ),
        RoundOpened(round=1, plan=1, participants=("a",), deadline=1_700_000_060),
        RoundClosed(round=1, stragglers={}, bytes_down=0),
        RoundAggregated(
            round=1, adapter=adapter, checks={}, relative_error=0, discarded_energy=0, matrices={},
            effective_rank=4, seconds=0.1,
        ),
        Finished(phase=Phase.SUCCEEDED, reason="RoundsCompleted", message="1 rounds done"),
    ]  # fmt: skip
    for at, record in enumerate(records):
        ledger.append(Entry(UID, record.key, 1_700_000_000 + at, record.to_json()))
    ledger.close()
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("samples")
    model = save_tiny_model("llama", root / "model")
    (model / "generation_config.json").unlink(missing_ok=True)
    return make_run(root / "run", model)


def report(monkeypatch, directory, *more):
    monkeypatch.setattr("sys.argv", ["fedpipe", "report", str(directory.root), *map(str, more)])
    monkeypatch.setenv("COLUMNS", "200")
    return main()


def test_prompts_are_answered_without_the_adapter_and_with_it(run, tmp_path, monkeypatch, capsys):
    prompts = [" ".join(WORDS[:3]), f"<script>alert(1)</script> {WORDS[4]}"]
    (tmp_path / "prompts.txt").write_text("\n" + "\n\n".join(prompts) + "\n")
    assert report(monkeypatch, run, "--prompts", tmp_path / "prompts.txt") == 0
    shown = capsys.readouterr().out
    found = json.loads(run.samples.read_text())["samples"]
    assert [sample["prompt"] for sample in found] == prompts
    for sample in found:
        assert sample["before"] != sample["after"]
        assert f"{sample['prompt']}\n  before: {sample['before']}\n  after:  {sample['after']}\n" in shown
        assert len(sample["after"].split()) <= 64
    assert "in peft" not in shown, "the summary is what the run and a report without prompts print"
    assert shown.endswith(f"report   {run.report}\n")
    text = run.report.read_text()
    assert "The most likely answers to 2 given prompts, after round 1" in text
    assert f"<td>{found[0]['after']}</td>" in text
    assert "<script>" not in text
    # The report is written again without asking again.
    assert report(monkeypatch, run) == 0
    assert run.report.read_text() == text
    # What an earlier adapter said is not shown as this one's.
    kept = run.samples.read_text()
    run.samples.write_text(kept.replace(json.loads(kept)["adapter"], "0" * 64))
    assert report(monkeypatch, run) == 0
    assert "Sample answers" not in run.report.read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "{path}: No such file or directory"),
        (b"\n \n", "{path}: 0 prompts; give 1 to 20, one a line"),
        (b"x\n" * 21, "{path}: 21 prompts; give 1 to 20, one a line"),
        (b"caf\xe9", "{path}: not UTF-8; write the prompts as text, one a line"),
        (b"x" * 70_000, "{path}: larger than 64 KiB; give a few prompts, one a line"),
        (b"apple\n" + b"pear " * 200, "{path}: prompt 2: 200 tokens, the model takes 64; shorten it"),
    ],
)
def test_prompts_that_cannot_be_asked_are_named(run, tmp_path, monkeypatch, capsys, content, message):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    assert report(monkeypatch, run, "--prompts", path) == 2
    assert capsys.readouterr().err == f"--prompts: {message.format(path=path)}\n"


def test_a_classifier_has_no_answers(tmp_path, monkeypatch, capsys):
    model = save_tiny_model("bert", tmp_path / "model")
    directory = make_run(tmp_path / "run", model, "sequence-classification")
    (tmp_path / "prompts.txt").write_text("apple\n")
    capsys.readouterr()
    assert report(monkeypatch, directory, "--prompts", tmp_path / "prompts.txt") == 2
    said = "--prompts: job words trains a classifier, which generates no text\n"
    assert capsys.readouterr().err == said
