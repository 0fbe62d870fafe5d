# SPDX-License-Identifier: Apache-2.0
"""What a run shows: on a terminal of 80 columns, in lines, as JSON; of a state as the engine has it."""

import io
import json
import math

import pytest
from rich.console import Console

from fedpipe_api.conditions import Reason
from fedpipe_api.job import FedPipeJob
from fedpipe_api.wire import STARTING, DeviceFacts, Evaluation, MatrixShape, ModelShape, NodePlan, Progress
from fedpipe_operator.engine.decide import Wait
from fedpipe_operator.engine.events import JobEvent
from fedpipe_operator.engine.jobs import Job, Live
from fedpipe_operator.engine.records import AgentRegistered, Evaluated, Offered, PlanMade, Submitted
from fedpipe_operator.engine.state import apply, submitted
from fedpipe_operator.local.json_lines import JsonView
from fedpipe_operator.local.live import picture
from fedpipe_operator.local.progress import PlainView, QuietView
from fedpipe_operator.local.wording import loss_text, metric_text

NODES = ("edge-a", "edge-b")
SHAPE = "0" * 64
DEVICE = DeviceFacts(kind="cpu", name="cpu", free_memory=1, overhead=1, threads=1, speed=1, kernels=())
MODEL = ModelShape(
    architecture="gpt2", layers=1, hidden=4, heads=1, key_value_heads=1, intermediate=4, vocabulary=9,
    causal=True, parameters=99, linear_parameters=9, matrices=(MatrixShape(name="h.0.fc", rows=4, columns=4),),
)  # fmt: skip
PLAN = NodePlan(
    precision="fp32", micro_batch=4, accumulation=2, ranks={"h.0.fc": 8}, local_steps=24, predicted_bytes=1,
    predicted_step_seconds=1, predicted_round_seconds=1, limited_by="memory",
)  # fmt: skip


def job(task="causal-lm", records=()):
    labels = {"labels": ["a", "b"]} if task == "sequence-classification" else {}
    spec = {
        "model": {"hostPath": {"path": "/base"}, "task": task} | labels,
        "data": {"train": "train.jsonl"},
        "rounds": {"count": 3},
    }
    spec = FedPipeJob.model_validate({"metadata": {"name": "words"}, "spec": spec}).spec
    state = submitted("uid", Submitted(namespace="n", name="words", generation=1, spec=spec), 0)
    for record in (Offered(sequence=1, nodes=NODES), *records):
        apply(state, record, 0)
    found = Job(state)
    found.wait = Wait(Reason.WAITING_FOR_AGENTS, "0 of 2 agents registered")
    return found


def registered():
    return [
        AgentRegistered(
            sequence=i + 2,
            node=node,
            device=DEVICE,
            samples=9,
            evaluation_samples=3,
            model=MODEL,
            shape=SHAPE,
        )
        for i, node in enumerate(NODES)
    ]


def planned():
    facts = {"left_out": {}, "selected": ("h.0.fc",), "considered": NODES, "shape": SHAPE}
    return [*registered(), PlanMade(version=1, reason="all", nodes=dict.fromkeys(NODES, PLAN), **facts)]


def does(found, node, state, **fields):
    found.live[node] = Live(0.0, Progress(kind="profile", round=0, state=state, **fields))


def drawn(found, width=80, **seconds):
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(picture("words", found, width, 65.0, seconds))
    return out.getvalue().splitlines()


@pytest.mark.parametrize("state", STARTING)
def test_a_node_that_starts_says_at_what_and_for_how_long(state):
    found = job()
    does(found, "edge-a", state)
    lines = drawn(found, **{"edge-a": 12.3})
    assert "0 of 2 agents registered" in lines[0]
    assert lines[0].endswith("1:05")
    assert lines[2].split() == ["edge-a", *state.split(), "12s"]
    assert lines[3].split() == ["edge-b", "starting"]


def test_profiling_shows_its_steps_and_training_says_that_its_loss_is_the_trains():
    found = job(records=planned())
    does(found, "edge-a", "profiling", step=3, steps=10)
    does(found, "edge-b", "loading")
    lines = drawn(found, **{"edge-b": 4.0})
    assert lines[2].split() == ["edge-a", "fp32", "r", "8", "4×2", "profiling", "3/10"]
    assert lines[3].split() == ["edge-b", "fp32", "r", "8", "4×2", "loading", "4s"]
    does(found, "edge-a", "training", step=3, steps=24, loss=2.345)
    lines = drawn(found)
    assert lines[1].split()[-2:] == ["train", "loss"]
    assert lines[2].split()[-3:] == ["training", "3/24", "2.35"]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_is_wider_than_the_terminal(width):
    found = job(records=planned())
    for node in NODES:
        does(found, node, "checking kernels", message="x")
        found.state.lost[node] = "killed; " * 30
    assert max(map(len, drawn(found, width, **dict.fromkeys(NODES, 7000.0)))) <= width


def evaluated(number, loss, **fields):
    return [
        Evaluated(
            node=node,
            evaluation=Evaluation(
                round=number, samples=3, tokens=3, loss_sum=3 * loss, precision="fp32", **fields
            ),
        )
        for node in NODES
    ]


def test_a_language_model_is_judged_by_perplexity_which_stays_finite():
    state = job(records=[*planned(), *evaluated(0, 2.0)]).state
    assert metric_text(state, 0) == f"perplexity {math.exp(2):.4g}"
    assert loss_text(state, 0) == "evaluation loss 2.000"
    worst = job(records=[*planned(), *evaluated(0, 1000.0)]).state
    assert metric_text(worst, 0) == "perplexity 1.014e+304"


def test_a_classifier_is_judged_by_accuracy():
    state = job("sequence-classification", [*planned(), *evaluated(0, 0.5, correct=2)]).state
    assert metric_text(state, 0) == "accuracy 0.667"
    assert loss_text(state, 0) == "evaluation loss 0.500"


def test_lines_have_each_state_of_a_node_once_and_never_break_a_path():
    out = io.StringIO()
    view = PlainView(Console(file=out, width=80, highlight=False))
    found = job()
    does(found, "edge-a", "importing")
    view.show(found)
    view.show(found)
    does(found, "edge-a", "reading data")
    view.show(found)
    path = "/a/long/directory" * 12 + "/train.jsonl:3"
    view.event(JobEvent(True, Reason.AGENT_FAILED, f"edge-b: {path}: no field"))
    lines = [line[10:] for line in out.getvalue().splitlines()]
    assert lines == [
        "  edge-a  importing", "  edge-b  starting", "  edge-a  reading data",
        f"AgentFailed: edge-b: {path}: no field",
    ]  # fmt: skip


def test_json_has_an_object_for_each_state_plan_round_and_notice(capsys):
    view = JsonView()
    with view.stage("reading rows and model"):
        pass
    found = job(records=planned())
    does(found, "edge-a", "loading")
    view.show(found)
    for record in evaluated(0, 2.0):
        apply(found.state, record, 1)
    view.show(found)
    view.event(JobEvent(False, Reason.PLANNED, "2 of 2 nodes fit"))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(line["time"].endswith("Z") for line in lines)
    assert [line["event"] for line in lines] == ["stage", "node", "node", "plan", "round", "notice"]
    stage, first, _, plan, zero, notice = lines
    assert stage["stage"] == "reading rows and model"
    assert (first["node"], first["state"]) == ("edge-a", "loading")
    assert plan["nodes"]["edge-b"]["microBatch"] == 4
    assert plan["leftOut"] == {}
    assert (zero["round"], zero["loss"], zero["perplexity"]) == (0, 2.0, pytest.approx(math.exp(2)))
    assert (notice["reason"], notice["warning"]) == ("Planned", False)


def test_quiet_is_quiet(capsys):
    view = QuietView()
    with view, view.stage("reading"):
        view.show(job())
        view.event(JobEvent(True, Reason.AGENT_LOST, "edge-a: gone"))
    assert capsys.readouterr() == ("", "")
