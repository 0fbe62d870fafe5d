# SPDX-License-Identifier: Apache-2.0
"""Whatever one node is accepted with, the job's plan, metric and status are made, and the others keep their part."""

import math

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedpipe_api.wire import Evaluation, KernelResult, Precision, ProfileReport, Registration, UpdateManifest
from fedpipe_operator.engine import accept
from fedpipe_operator.engine.accept import Refused
from fedpipe_operator.engine.evaluations import evaluation_of
from fedpipe_operator.engine.planning import importance, request_of
from fedpipe_operator.engine.records import (
    AgentRegistered,
    Evaluated,
    Offered,
    PlanMade,
    Profiled,
    RoundClosed,
    RoundOpened,
    Submitted,
    UpdateAccepted,
)
from fedpipe_operator.engine.shapes import digest_of
from fedpipe_operator.engine.state import JobState, apply, submitted
from fedpipe_operator.engine.status import status
from fedpipe_operator.planner import plan
from standins.agents import manifest_of, model_shape, registration
from standins.server import job

SHAPE = model_shape(4)
NODES = ("a", "b", "liar")
COUNTS = st.sampled_from([0, 1, 2, 100, 10**6, 10**12, 2**53])
BYTES = st.sampled_from([0, 1, 1 << 20, 400 << 20, 1 << 30, 4 << 30, 1 << 45, 2**53])
SECONDS = st.sampled_from([0.0, 5e-324, 1e-9, 0.01, 1.0, 1e6, 1e9])
MEASURED = SECONDS.filter(lambda seconds: seconds >= 1e-9)
ROUNDS = st.sampled_from([{"localSteps": 2}, {}, {"localEpochs": 1000.0}])


@st.composite
def registrations(draw: st.DrawFn) -> Registration:
    good = registration(SHAPE)
    kernels = tuple(
        KernelResult(precision=precision, usable=draw(st.booleans()), seconds=draw(st.none() | SECONDS))
        for precision in Precision
    )
    device = good.device.model_copy(
        update={
            "free_memory": draw(BYTES),
            "overhead": draw(BYTES),
            "threads": draw(st.sampled_from([1, 4, 65536])),
            "speed": draw(st.sampled_from([1e-6, 1.0, 1e6])),
            "link_rate": draw(st.sampled_from([None, 1, 10**6, 2**53])),
            "kernels": kernels,
        }
    )
    counts = {"samples": draw(COUNTS.filter(bool)), "evaluation_samples": draw(COUNTS)}
    return Registration.model_validate(good.model_copy(update={"device": device} | counts).to_dict())


def planned(state: JobState, version: int) -> PlanMade:
    made = plan(request_of(state))
    record = PlanMade(
        version=version, reason="", shape=state.shape, nodes=made.nodes, left_out=made.left_out,
        selected=made.selected, scores=dict(importance(state) or {}), considered=state.live,
    )  # fmt: skip
    # What is recorded can be read again.
    assert PlanMade.model_validate_json(record.to_json()) == record
    return record


@settings(max_examples=40, deadline=None)
@given(st.data(), registrations(), ROUNDS)
def test_one_node_never_keeps_the_others_from_their_plan(
    data: st.DataObject, lie: Registration, rounds: dict[str, object]
) -> None:
    spec = job(1, 5, rounds={"count": 5, "minUpdates": 1, "deadline": "5m"} | rounds).spec
    state = submitted("uid", Submitted(namespace="n", name="j", generation=1, spec=spec), 0.0)
    apply(state, Offered(sequence=1, nodes=NODES), 0.0)
    for node in NODES:
        message = lie if node == "liar" else registration(SHAPE)
        accept.registration(state, node, message)
        record = AgentRegistered(
            sequence=2, node=node, device=message.device, samples=message.samples,
            evaluation_samples=message.evaluation_samples, shape=digest_of(SHAPE), model=SHAPE,
        )  # fmt: skip
        apply(state, record, 1.0)
    first = planned(state, 1)
    assert {"a", "b"} <= first.nodes.keys()
    apply(state, first, 2.0)
    for node, made in first.nodes.items():
        dishonest = node == "liar"
        score = st.sampled_from([0.0, 5e-324, 1.0, 1e30]) if dishonest else st.just(1.0)
        report = ProfileReport(
            step_seconds=data.draw(MEASURED) if dishonest else 0.5,
            peak_bytes=data.draw(BYTES) if dishonest else 1 << 29,
            micro_batch=made.micro_batch,
            scores={matrix.name: data.draw(score) for matrix in SHAPE.matrices},
        )
        accept.profile(state, node, report)
        apply(state, Profiled(node=node, report=report), 3.0)
    found = importance(state)
    assert found
    assert all(math.isfinite(value) for value in found.values())
    second = planned(state, 2)
    assert {"a", "b"} <= second.nodes.keys()
    apply(state, second, 4.0)
    apply(state, RoundOpened(round=1, plan=2, participants=tuple(second.nodes), deadline=304.0), 4.0)
    for node, made in second.nodes.items():
        claims = {}
        if node == "liar":
            claims = {
                "step_seconds": data.draw(SECONDS), "peak_bytes": data.draw(BYTES),
                "train_loss": data.draw(st.sampled_from([-1e9, 0.0, 1e9])), "steps": data.draw(COUNTS),
                "size": data.draw(BYTES.filter(bool)), "download_seconds": data.draw(SECONDS),
            }  # fmt: skip
        manifest = manifest_of(node.encode(), made).model_copy(update={"samples": 1, "tokens": 0} | claims)
        manifest = UpdateManifest.model_validate(manifest.to_dict())
        try:
            accept.update(state, node, 1, manifest)
        except Refused:
            assume(node == "liar")
            continue
        apply(state, UpdateAccepted(round=1, node=node, manifest=manifest), 10.0)
    for node in second.nodes:
        held_out = state.agents[node].evaluation_samples
        if not held_out:
            continue
        samples = data.draw(st.sampled_from([1, held_out])) if node == "liar" else 10
        share = data.draw(st.sampled_from([0, 1])) if node == "liar" else 0
        message = Evaluation(
            round=0, samples=samples, tokens=samples, loss_sum=1000.0 * share * samples,
            correct=share * samples, precision=second.nodes[node].precision,
        )  # fmt: skip
        accept.evaluation(state, node, message)
        apply(state, Evaluated(node=node, evaluation=message), 11.0)
    metric = evaluation_of(state, 0)
    assert metric
    assert 0 <= metric.loss <= 1000
    assert metric.accuracy is not None
    assert metric.accuracy <= 3 / 5, "one of three counts for three fifths at most"
    missing = dict.fromkeys(set(second.nodes) - set(state.rounds[1].updates), 0)
    apply(state, RoundClosed(round=1, stragglers=missing, bytes_down=0), 304.0)
    third = planned(state, 3)
    assert {"a", "b"} <= third.nodes.keys()
    apply(state, third, 305.0)
    status(state, None, {}).to_json()
