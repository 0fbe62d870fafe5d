# SPDX-License-Identifier: Apache-2.0
import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from safetensors.numpy import save

from fedpipe_api.job import FedPipeJob, Phase
from fedpipe_api.node import Fleet
from fedpipe_api.wire import (
    Blob,
    DeviceFacts,
    Evaluation,
    MatrixShape,
    ModelShape,
    NodePlan,
    ProfileReport,
    UpdateManifest,
)
from fedpipe_operator.cli import main
from fedpipe_operator.engine.records import (
    AgentLost,
    AgentRegistered,
    Evaluated,
    Finished,
    MatrixRecord,
    NodeCheck,
    Offered,
    PlanMade,
    Profiled,
    RoundAggregated,
    RoundClosed,
    RoundOpened,
    Submitted,
    UpdateAccepted,
)
from fedpipe_operator.engine.status import status
from fedpipe_operator.local.directory import RunDirectory, RunRecord
from fedpipe_operator.local.results import write_all_results
from fedpipe_operator.local.tracking import trackers_of
from fedpipe_operator.store import Blobs, Entry, Ledger

NODES = {
    "edge-a": ("fp32", 16, 1, (8, 16)),
    "edge-b": ("bf16", 8, 2, (4, 8)),
    "edge-c": ("nf4", 4, 4, (2, 2)),
    "edge-d": ("int8", 16, 1, (2, 4)),
}
MATRICES = tuple(
    f"bert.encoder.layer.{layer}.attention.{kind}"
    for layer in range(6)
    for kind in ("self.query", "self.key", "self.value", "output.dense")
)
MODEL = ModelShape(
    architecture="bert", layers=6, hidden=8, heads=2, key_value_heads=2, intermediate=16, vocabulary=100,
    causal=False, parameters=22_700_000, linear_parameters=10_000_000,
    matrices=tuple(MatrixShape(name=name, rows=8, columns=8) for name in MATRICES),
)  # fmt: skip
JOB = FedPipeJob.model_validate(
    {
        "metadata": {"name": "tickets"},
        "spec": {
            "model": {"hostPath": {"path": "/base"}, "task": "sequence-classification", "labels": ["a", "b"]},
            "data": {"volume": {"hostPath": {"path": "/data"}}, "train": "train.jsonl"},
            "rounds": {"count": 12, "localSteps": 50},
        },
    }
)
ONE_MATRIX = MatrixRecord(relative_error=0, discarded_energy=0, effective_rank=3, rank=8)
UID = "8d4f0f6c-0000-4000-8000-000000000000"


def plan_of(name):
    precision, micro, accumulation, (low, high) = NODES[name]
    ranks = {matrix: (low, high)[i % 2] for i, matrix in enumerate(MATRICES[:12])}
    return NodePlan(
        precision=precision, micro_batch=micro, accumulation=accumulation, ranks=ranks, local_steps=50,
        predicted_bytes=700 << 20, predicted_step_seconds=0.1, predicted_round_seconds=6,
        limited_by="memory" if name == "edge-c" else "maxRank",
    )  # fmt: skip


def manifest_of(digest, number, offset):
    return UpdateManifest(
        digest=digest, size=400_000 + 90_000 * offset, samples=500,
        steps=50 - 10 * (offset == 3), planned_steps=50, micro_batch=16,
        train_loss=2.0 / number + 0.1 * offset, step_seconds=0.1 + 0.02 * offset,
        peak_bytes=(600 + 60 * offset) << 20, tokens=50 * 1024, download_seconds=0.2, evaluate_seconds=0.6,
        train_seconds=5.0 + offset,
    )  # fmt: skip


def records(adapter, rounds, finished):
    """A run as the engine records it: four nodes, a straggler in round 2, every measurement."""
    yield 0, Submitted(namespace="default", name="tickets", generation=1, spec=JOB.spec)
    yield 0, Offered(sequence=1, nodes=tuple(NODES))
    device = DeviceFacts(
        kind="cpu", name="cpu", free_memory=1 << 30, overhead=1 << 28, threads=1, speed=1, kernels=()
    )
    for i, name in enumerate(NODES):
        yield 1, AgentRegistered(
            sequence=i + 2, node=name, device=device, samples=500, evaluation_samples=50,
            model=MODEL if i == 0 else None,
        )  # fmt: skip
    plans = {name: plan_of(name) for name in NODES}
    scores = {matrix: float(abs(np.sin(i)) + 0.01) for i, matrix in enumerate(MATRICES)}
    facts = {"nodes": plans, "left_out": {}, "considered": tuple(NODES)}
    yield 2, PlanMade(version=1, reason="all agents registered", selected=MATRICES, **facts)
    for name in NODES:
        yield (
            3,
            Profiled(
                node=name, report=ProfileReport(step_seconds=0.1, peak_bytes=1, micro_batch=4, scores=scores)
            ),
        )
    yield 4, PlanMade(version=2, reason="nodes measured", selected=MATRICES[:12], scores=scores, **facts)
    for number in range(rounds + 1):
        at = 5 + 10 * number
        if number:
            yield at, RoundOpened(round=number, plan=2, participants=tuple(NODES), deadline=at + 60)
            here = [name for name in NODES if (number, name) != (2, "edge-d")]
            for i, name in enumerate(here):
                yield (
                    at + 6 + i,
                    UpdateAccepted(round=number, node=name, manifest=manifest_of("0" * 64, number, i)),
                )
            late = {name: 31 for name in NODES if name not in here}
            yield (
                at + 9,
                RoundClosed(round=number, stragglers=late, bytes_down=2_000_000 if number > 1 else 0),
            )
            checks = {
                name: NodeCheck(norm=2.0 / number, cosine=0.3 + 0.02 * i, verdict="ok", reason="")
                for i, name in enumerate(here)
            }
            yield at + 9.2, RoundAggregated(
                round=number, adapter=adapter, checks=checks, relative_error=0.01 * number,
                discarded_energy=1e-4 * number, matrices={MATRICES[0]: ONE_MATRIX},
                effective_rank=5.0 + number, seconds=0.15,
            )  # fmt: skip
        for i, name in enumerate(NODES):
            loss = 50 * (2.5 / (1 + 0.3 * number) + 0.1 * i)
            correct = int(45 * number / (number + 1)) + i
            yield at + 9.5, Evaluated(
                node=name,
                evaluation=Evaluation(
                    round=number, samples=50, tokens=50, loss_sum=loss,
                    correct=correct, confusion=(correct, 30, 20 - correct, 0) if correct <= 20 else
                    (20, 50 - correct, 0, correct - 20), precision="fp32",
                ),
            )  # fmt: skip
    if finished:
        yield 170, Finished(phase=Phase.SUCCEEDED, reason="RoundsCompleted", message=f"{rounds} rounds done")


def make_run(root, rounds=12, finished=True):
    directory = RunDirectory(root)
    directory.create(
        RunRecord(
            uid=UID, job=JOB, fleet=Fleet.model_validate({"nodes": [{"name": "edge-a"}]}), model="/base"
        )
    )
    ledger, blobs = Ledger(directory.store / "ledger.sqlite"), Blobs(directory.store / "blobs")
    incoming = blobs.incoming()
    random = np.random.default_rng(0)
    factors = {}
    for matrix in MATRICES[:12]:
        factors[f"{matrix}.lora_B"] = random.normal(size=(8, 4)).astype(np.float32)
        factors[f"{matrix}.lora_A"] = random.normal(size=(4, 8)).astype(np.float32)
    incoming.write(save(factors))
    digest = incoming.finish()
    blobs.adopt(incoming.path, digest)
    for at, record in records(Blob(digest=digest, size=incoming.size), rounds, finished):
        ledger.append(Entry(UID, record.key, 1_700_000_000 + at, record.to_json()))
    ledger.close()
    return directory


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_a_finished_run_leaves_adapter_metrics_and_a_report_that_needs_nothing_else(tmp_path, capsys):
    directory = make_run(tmp_path / "run")
    assert write_all_results(directory, trackers_of(directory, directory.read_record())) == 0
    shown = capsys.readouterr().out
    assert "done in 2m50s · accuracy 0.850 (untrained 0.030) · 25.0 MB up, 22.0 MB down" in shown
    assert f'PeftModel.from_pretrained(base, "{directory.adapter}")' in shown
    assert {path.name for path in directory.adapter.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "README.md",
    }  # fmt: skip

    text = directory.report.read_text()
    page = Page(text)
    images = page.all("img")
    assert len(images) == 7
    assert all(image["src"].startswith("data:image/png;base64,") and image["alt"] for image in images)
    assert not re.search(r"(src|href)=\"?https?:|@import|url\(", text)
    assert page.all("html")[0]["lang"] == "en"
    assert all(cell.get("scope") in ("col", "row") for cell in page.all("th"))
    assert [cell["class"] for cell in page.all("td") if "class" in cell] == ["hit", "miss", "hit"]
    assert re.findall(r"<td class=[^>]*>(\d+)</td>", text) == ["80", "30", "90"]
    assert "after round 12, 4 nodes together" in text
    assert len(list(directory.plots.glob("*.png"))) == 7


HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</pre></details><svg onload=alert(1)>",
    "$\\frac{$",
    "```\n<iframe src=https://example.org>",
    "&lt;b&gt;",
)
TAGS = {
    "body", "details", "div", "figcaption", "figure", "h1", "h2", "head", "html", "img", "main", "meta", "p", "pre",
    "span", "style", "summary", "table", "tbody", "td", "th", "thead", "title", "tr",
}  # fmt: skip
ATTRIBUTES = {
    "alt", "aria-label", "charset", "class", "content", "lang", "name", "role", "scope", "src", "style", "tabindex",
}  # fmt: skip


def test_a_private_run_says_what_each_node_has_spent(tmp_path, monkeypatch, capsys):
    asked = {"privacy": {"epsilon": 8, "delta": 1e-5}, "adapter": {"selection": {"mode": "all"}}}
    private = JOB.to_dict()
    private["spec"] |= asked
    monkeypatch.setattr(sys.modules[__name__], "JOB", FedPipeJob.model_validate(private))
    plain, noise = plan_of, {"edge-a": 1.0, "edge-b": 2.0, "edge-c": 2.0, "edge-d": 2.0}
    monkeypatch.setattr(
        sys.modules[__name__],
        "plan_of",
        lambda name: plain(name).model_copy(update={"noise_multiplier": noise[name]}),
    )
    directory = make_run(tmp_path / "run")
    write_all_results(directory, trackers_of(directory, directory.read_record()))
    nodes = {node.name: node for node in status(directory.history().state, None, {}).node_table}
    most = f"{nodes['edge-a'].epsilon:.3g}"
    assert nodes["edge-b"].epsilon < nodes["edge-a"].epsilon
    text = directory.report.read_text()
    assert "ε spent</th>" in text
    assert all(f"<td>{node.epsilon:.3g}</td>" in text for node in nodes.values())
    assert f"ε {most} of 8 spent" in text
    monkeypatch.setattr(sys, "argv", ["fedpipe", "report", str(directory.root)])
    assert main() == 0
    said = capsys.readouterr().out
    assert f"ε {most} of 8 spent" in said
    table = said.partition("done in")[0]
    assert "ε spent" in table
    assert "…" not in table


def test_nothing_that_a_tenant_or_a_node_writes_is_markup(tmp_path, monkeypatch, capsys):
    """Class names and paths of the job, and the errors of its agents, are text wherever they are shown."""
    source = {"hostPath": {"path": f"/{HOSTILE[3]}"}, "task": "sequence-classification", "labels": HOSTILE}
    spec = JOB.spec.to_dict() | {"model": source, "podTemplate": {"metadata": {"labels": {"a": HOSTILE[0]}}}}
    monkeypatch.setattr(
        sys.modules[__name__], "JOB", JOB.model_copy(update={"spec": JOB.spec.model_validate(spec)})
    )
    plain, classes = records, len(HOSTILE)

    def hostile(adapter, rounds, finished):
        for at, record in plain(adapter, rounds, False):
            if isinstance(record, Evaluated):
                right = record.evaluation.correct
                changes = {"confusion": (right, 50 - right) + (0,) * (classes**2 - 2)}
                yield at, Evaluated(node=record.node, evaluation=record.evaluation.model_copy(update=changes))
            else:
                yield at, record
        yield 165, AgentLost(sequence=9, node="edge-d", reason=HOSTILE[1] + HOSTILE[5], failed=True)
        yield 170, Finished(phase=Phase.FAILED, reason="RoundsFailed", message=HOSTILE[0] + HOSTILE[2])

    monkeypatch.setattr(sys.modules[__name__], "records", hostile)
    directory = make_run(tmp_path / "run", rounds=2)
    write_all_results(directory, trackers_of(directory, directory.read_record()))
    text = directory.report.read_text()
    page = Page(text)
    assert {tag for tag, _ in page.tags} <= TAGS
    assert {name for _, attributes in page.tags for name in attributes} <= ATTRIBUTES
    assert all("alert" not in str(value) for _, given in page.tags for name, value in given.items()
               if name not in ("alt", "aria-label"))  # fmt: skip
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    card = (directory.adapter / "README.md").read_text()
    assert [line for line in card.splitlines() if line.startswith("```")] == ["```python", "```"]
    assert not re.search("^<", card, re.MULTILINE)
    assert "\x1b" not in capsys.readouterr().out


def test_metrics_have_one_object_for_each_round_with_everything_measured(tmp_path):
    directory = make_run(tmp_path / "run")
    write_all_results(directory, trackers_of(directory, directory.read_record()))
    rows = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    assert [row["round"] for row in rows] == list(range(13))
    third = rows[3]
    assert third["accuracy"] == pytest.approx((4 * 33 + 6) / 200)
    assert third["bytesUp"] == 4 * 400_000 + 6 * 90_000
    assert third["seconds"] == pytest.approx(9.2)
    assert third["overheadSeconds"] == pytest.approx(9.2 - 8.8)
    assert third["underTraining"] == pytest.approx(10 / 200)
    node = third["nodes"]["edge-c"]
    assert (node["precision"], node["microBatch"], node["accumulation"]) == ("nf4", 4, 4)
    assert (node["minRank"], node["maxRank"], node["matrices"]) == (2, 2, 12)
    assert (node["peakBytes"], node["updateNorm"]) == (720 << 20, pytest.approx(2 / 3))
    assert rows[2]["stragglers"] == {"edge-d": 31}
    assert rows[2]["nodes"]["edge-d"]["counted"] is False
    assert rows[2]["underTraining"] == pytest.approx(50 / 200)


def test_report_rebuilds_from_the_ledger_even_before_the_end(tmp_path, capsys, monkeypatch):
    directory = make_run(tmp_path / "run", rounds=2, finished=False)
    monkeypatch.setattr("sys.argv", ["fedpipe", "report", str(directory.root)])
    assert main() == 0
    assert "stopped after 34s" in capsys.readouterr().out
    assert directory.report.exists()
    assert not directory.adapter.exists()


def test_export_writes_the_latest_adapter(tmp_path, capsys, monkeypatch):
    directory = make_run(tmp_path / "run", rounds=1, finished=False)
    monkeypatch.setattr(
        "sys.argv", ["fedpipe", "export", str(directory.root), "--out", str(tmp_path / "adapter")]
    )
    assert main() == 0
    assert (tmp_path / "adapter/adapter_config.json").exists()
    assert main() == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("command", ["report", "export"])
def test_a_directory_without_a_run_is_refused_in_one_line(command, tmp_path, capsys, monkeypatch):
    out = ["--out", str(tmp_path / "out")] if command == "export" else []
    monkeypatch.setattr("sys.argv", ["fedpipe", command, str(tmp_path / "none"), *out])
    assert main() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "none: holds no run" in error
    assert not list(tmp_path.iterdir())
