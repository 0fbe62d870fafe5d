# SPDX-License-Identifier: Apache-2.0
import pytest

from fedpipe_api.conditions import Reason
from fedpipe_api.job import FedPipeJob, Phase
from fedpipe_api.wire import DeviceFacts, NodePlan, ProfileReport, UpdateManifest
from fedpipe_operator.engine.decide import Wait
from fedpipe_operator.engine.jobs import Job
from fedpipe_operator.engine.records import (
    AgentLost,
    AgentRegistered,
    Finished,
    Offered,
    PlanMade,
    Profiled,
    RoundOpened,
    Submitted,
    UpdateAccepted,
)
from fedpipe_operator.engine.state import apply, submitted
from fedpipe_operator.local.run import End, RunOutcome, outcome_of

SPEC = FedPipeJob.model_validate(
    {
        "metadata": {"name": "job"},
        "spec": {
            "model": {"hostPath": {"path": "/base"}, "task": "causal-lm"},
            "data": {"volume": {"hostPath": {"path": "/data"}}, "train": "train.jsonl"},
            "rounds": {"count": 3},
        },
    }
).spec
DEVICE = DeviceFacts(kind="cpu", name="cpu", free_memory=1, overhead=1, threads=1, speed=1, kernels=())
PLAN = NodePlan(
    precision="fp32", micro_batch=1, accumulation=1, ranks={}, local_steps=1, predicted_bytes=1,
    predicted_step_seconds=1, predicted_round_seconds=1, limited_by="memory",
)  # fmt: skip
MANIFEST = UpdateManifest(
    digest="0" * 64, size=1, samples=1, steps=1, planned_steps=1, micro_batch=1, train_loss=1,
    step_seconds=1, peak_bytes=1, tokens=1,
)  # fmt: skip
REPORT = ProfileReport(step_seconds=1, peak_bytes=1, micro_batch=1)


def registered(node, sequence):
    return AgentRegistered(sequence=sequence, node=node, device=DEVICE, samples=1, evaluation_samples=0)


def plan(version):
    return PlanMade(
        version=version,
        reason="",
        nodes={"a": PLAN, "b": PLAN},
        left_out={},
        selected=(),
        considered=("a", "b"),
    )


START = [Offered(sequence=1, nodes=("a", "b")), registered("a", 2)]
BOTH = [*START, registered("b", 3)]
PLANNED = [*BOTH, plan(1)]
OPEN = [
    *PLANNED, Profiled(node="a", report=REPORT), Profiled(node="b", report=REPORT), plan(2),
    RoundOpened(round=1, plan=2, participants=("a", "b"), deadline=9),
]  # fmt: skip


def job(records, reason, until=None):
    state = submitted("uid", Submitted(namespace="n", name="job", generation=1, spec=SPEC), 0)
    for record in records:
        apply(state, record, 0)
    found = Job(state)
    found.wait = Wait(reason, "waiting", until)
    return found


B_LOST = AgentLost(sequence=9, node="b", reason="killed")
CASES = {
    "an agent has still to register": (START, Reason.WAITING_FOR_AGENTS, {}, None),
    "an agent is started again": ([*BOTH, B_LOST], Reason.WAITING_FOR_AGENTS, {}, None),
    "the missing agent failed for good": (START, Reason.NOT_ENOUGH_NODES, {"b": "no memory"}, End.MISTAKE),
    "no plan fits those that are there": (BOTH, Reason.PLAN_INFEASIBLE, {}, End.MISTAKE),
    "a node is still measured": (
        [*PLANNED, Profiled(node="a", report=REPORT)], Reason.PROFILING, {}, None,
    ),
    "nobody is left to be measured": (
        [*PLANNED, Profiled(node="a", report=REPORT), B_LOST], Reason.PROFILING, {"b": "killed"}, End.MISTAKE,
    ),
    "a participant still trains": (OPEN, Reason.QUORUM_LOST, {}, None),
    "the rest of the quorum failed": (
        [*OPEN, UpdateAccepted(round=1, node="a", manifest=MANIFEST), B_LOST],
        Reason.QUORUM_LOST, {"b": "killed"}, End.STUCK,
    ),
    "the rest of the quorum is started again": (
        [*OPEN, UpdateAccepted(round=1, node="a", manifest=MANIFEST), B_LOST], Reason.QUORUM_LOST, {}, None,
    ),
    "the store is tried again": (OPEN, Reason.STORE_FULL, {"a": "x", "b": "x"}, None),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_session_ends_only_when_nobody_can_help_it(case):
    records, reason, failed, end = CASES[case]
    outcome = outcome_of(job(records, reason), failed, {})
    assert (outcome and outcome.end) is end
    if outcome:
        assert outcome.message == "waiting" + "".join(f"; {node}: {why}" for node, why in failed.items())
    assert outcome_of(job(records, reason, until=99.0), failed, {}) is None


def test_a_mistake_ends_the_session_before_the_first_round_only():
    mistakes = {"b": "train.jsonl:3: no field text"}
    assert outcome_of(job(PLANNED, Reason.PROFILING, 9.0), mistakes, mistakes) == RunOutcome(
        End.MISTAKE, "b: train.jsonl:3: no field text"
    )
    assert outcome_of(job(OPEN, Reason.ROUND_OPEN, 9.0), mistakes, mistakes) is None


def test_the_end_of_the_job_is_the_end_of_the_session():
    done = Finished(phase=Phase.FAILED, reason="Invalid", message="x")
    assert outcome_of(job([*OPEN, done], Reason.QUORUM_LOST), {}, {}) == RunOutcome(End.FINISHED)
