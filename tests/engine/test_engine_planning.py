# SPDX-License-Identifier: Apache-2.0
"""From the ledger to the planner's question: importance by samples, measurements, stragglers."""

import pytest

from fedpipe_api.wire import NodePlan, ProfileReport
from fedpipe_operator.engine.planning import importance, killed, request_of
from fedpipe_operator.engine.records import (
    AgentLost,
    AgentRegistered,
    Offered,
    PlanMade,
    Profiled,
    RoundClosed,
    RoundOpened,
    SpecChanged,
    Submitted,
    UpdateAccepted,
)
from fedpipe_operator.engine.state import JobState, apply, submitted
from fedpipe_operator.planner import plan
from standins.agents import make_update, manifest_of, model_shape, registration
from standins.server import job

SHAPE = model_shape(4)
NODES = ("a", "b")


def profiled(max_length: int | None = None) -> JobState:
    """A job of two nodes, b with three times the samples, planned and profiled."""
    spec = job(2, 5).spec
    if max_length is not None:
        spec = spec.model_copy(update={"data": spec.data.model_copy(update={"max_length": max_length})})
    state = submitted("uid", Submitted(namespace="n", name="j", generation=1, spec=spec), 0.0)
    apply(state, Offered(sequence=1, nodes=NODES), 0.0)
    for node, samples in zip(NODES, (100, 300), strict=True):
        device = registration(SHAPE).device
        apply(
            state,
            AgentRegistered(
                sequence=2, node=node, device=device, samples=samples, evaluation_samples=1, model=SHAPE
            ),
            1.0,
        )
    first = plan(request_of(state))
    made = PlanMade(
        version=1,
        reason="",
        nodes=first.nodes,
        left_out={},
        selected=first.selected,
        considered=NODES,
    )
    apply(state, made, 2.0)
    for node, score in zip(NODES, (1.0, 3.0), strict=True):
        scores = {m.name: score * (1 + i) for i, m in enumerate(SHAPE.matrices)}
        report = ProfileReport(
            step_seconds=0.5, peak_bytes=1 << 29, micro_batch=first.nodes[node].micro_batch, scores=scores
        )
        apply(state, Profiled(node=node, report=report), 3.0)
    return state


def test_scores_are_averaged_by_samples() -> None:
    scores = importance(profiled())
    assert scores == {m.name: pytest.approx(2.5 * (1 + i)) for i, m in enumerate(SHAPE.matrices)}


def test_a_resumed_job_keeps_its_scores_until_its_agents_are_back() -> None:
    state = profiled()
    scores = dict(importance(state) or {})
    second = plan(request_of(state))
    made = PlanMade(
        version=2, reason="", nodes=second.nodes, left_out={}, selected=second.selected, scores=scores,
        considered=NODES,
    )  # fmt: skip
    apply(state, made, 4.0)
    for generation, suspend in ((2, True), (3, False)):
        spec = state.spec.model_copy(update={"suspend": suspend})
        apply(state, SpecChanged(generation=generation, spec=spec), 5.0)
    apply(state, Offered(sequence=9, nodes=("a", "b", "c")), 6.0)
    device = registration(SHAPE).device
    apply(state, AgentRegistered(sequence=10, node="c", device=device, samples=10, evaluation_samples=1), 7.0)
    assert importance(state) == scores
    assert set(plan(request_of(state)).nodes) == {"c"}


def test_the_most_important_matrices_are_selected_after_profiling() -> None:
    made = plan(request_of(profiled()))
    assert set(made.selected) == {"encoder.2.query", "encoder.3.query"}
    assert all(set(node.ranks) <= set(made.selected) for node in made.nodes.values())


def test_predictions_meet_the_measurement() -> None:
    made = plan(request_of(profiled()))
    for node in made.nodes.values():
        assert node.predicted_step_seconds == pytest.approx(0.5, rel=0.2)


def trained(
    state: JobState, updates: tuple[str, ...], stragglers: dict[str, int], closed: float = 304.0
) -> None:
    """Let round 1 pass: 300 seconds, where the clock does not jump."""
    second = plan(request_of(state))
    apply(
        state,
        PlanMade(
            version=2,
            reason="",
            nodes=second.nodes,
            left_out={},
            selected=second.selected,
            considered=NODES,
        ),
        4.0,
    )
    apply(state, RoundOpened(round=1, plan=2, participants=NODES, deadline=304.0), 4.0)
    for node in updates:
        body = make_update(SHAPE, second.nodes[node], node, 1)
        manifest = manifest_of(body, second.nodes[node]).model_copy(
            update={"step_seconds": 2.0, "peak_bytes": 1 << 29}
        )
        apply(state, UpdateAccepted(round=1, node=node, manifest=manifest), 10.0)
    apply(state, RoundClosed(round=1, stragglers=stragglers, bytes_down=0), closed)


def test_a_node_killed_for_memory_is_planned_with_less_each_time_until_nothing_fits() -> None:
    state = profiled(2048)
    sizes = [plan(request_of(state)).nodes["a"].predicted_bytes]
    for number in range(30):
        apply(state, AgentLost(sequence=9 + number, node="a", reason="", killed_bytes=sizes[-1]), 4.0)
        device = registration(SHAPE).device
        apply(
            state,
            AgentRegistered(
                sequence=10 + number, node="a", device=device, samples=100, evaluation_samples=1, model=SHAPE
            ),
            5.0,
        )
        made = plan(request_of(state))
        assert "b" in made.nodes
        if "a" in made.left_out:
            break
        sizes.append(made.nodes["a"].predicted_bytes)
        assert sizes[-1] <= 0.8 * sizes[-2]
    assert len(sizes) > 2
    assert made.left_out["a"].startswith("needs ")
    assert "; its agent was killed for memory at" in killed(state, "a")


def test_an_update_calibrates_again() -> None:
    state = profiled()
    trained(state, NODES, {})
    made = plan(request_of(state))
    assert made.nodes["a"].predicted_step_seconds == pytest.approx(2.0, rel=0.2)


def test_a_straggler_is_asked_for_fewer_steps_and_keeps_its_place() -> None:
    state = profiled()
    spec = state.spec.model_copy(
        update={"rounds": state.spec.rounds.model_copy(update={"local_steps": 100, "deadline": 300.0})}
    )
    state.spec = spec
    trained(state, ("a",), {"b": 30})
    made = plan(request_of(state))
    assert made.nodes["b"].limited_by == "time"
    assert 10 <= made.nodes["b"].local_steps < 35, "it did 30 steps in a whole round"
    assert made.nodes["a"].local_steps == 100


@pytest.mark.parametrize("closed", [4.0, -3600.0])
def test_a_clock_that_goes_back_says_nothing_of_a_straggler(closed: float) -> None:
    state = profiled()
    before = request_of(state).nodes[1].calibration
    trained(state, ("a",), {"b": 0}, closed)
    assert request_of(state).nodes[1].calibration == before, "its profile still holds"
    assert plan(request_of(state)).nodes.keys() == {"a", "b"}


def test_a_clock_that_is_set_forward_counts_as_the_deadline() -> None:
    """As on a board without a battery that first starts in 1970."""
    forward, usual = profiled(), profiled()
    trained(forward, ("a",), {"b": 30}, 1.8e9)
    trained(usual, ("a",), {"b": 30})
    assert request_of(forward) == request_of(usual)


def test_a_node_that_joins_late_has_no_calibration() -> None:
    state = profiled()
    trained(state, NODES, {})
    apply(state, Offered(sequence=9, nodes=("a", "b", "c")), 305.0)
    device = registration(SHAPE).device
    late = AgentRegistered(sequence=10, node="c", device=device, samples=10, evaluation_samples=1)
    apply(state, late, 306.0)
    facts = {node.name: node for node in request_of(state).nodes}
    assert facts["c"].calibration is None
    assert facts["a"].calibration is not None
    assert isinstance(plan(request_of(state)).nodes["c"], NodePlan)
