# SPDX-License-Identifier: Apache-2.0
"""Events name what happened: who failed, who came back, what a change of the spec did."""

import pytest

from fedpipe_api.conditions import Reason
from fedpipe_api.job import Precision
from fedpipe_api.wire import KernelResult
from fedpipe_operator.engine.events import Before, JobEvent, event_of
from fedpipe_operator.engine.records import AgentLost, PlanMade, Record, SpecChanged
from fedpipe_operator.engine.state import apply
from standins.world import PLAN, World


def noted(world: World, record: Record) -> JobEvent | None:
    before = Before.of(world.state)
    apply(world.state, record, world.now)
    return event_of(world.state, record, before)


@pytest.fixture
def world() -> World:
    found = World(3, 1)
    for node in found.nodes:
        found.register(node)
    return found


@pytest.mark.parametrize(("failed", "reason"), [(True, Reason.AGENT_FAILED), (False, Reason.AGENT_LOST)])
def test_an_error_of_an_agent_is_not_its_silence(world: World, failed: bool, reason: Reason) -> None:
    record = AgentLost(sequence=world.state.sequence + 1, node="node-1", reason="why", failed=failed)
    assert noted(world, record) == JobEvent(True, reason, "node-1: why")


def test_what_a_nodes_policy_forbids_is_its_own_reason(world: World) -> None:
    why = "/etc/fedpipe/policy.yaml: spec.jobs.names: job j may not train here"
    reason = f"PolicyForbids: {why}"
    record = AgentLost(sequence=world.state.sequence + 1, node="node-1", reason=reason, failed=True)
    assert noted(world, record) == JobEvent(True, Reason.POLICY_FORBIDS, f"node-1: {why}")


def test_a_lost_agent_that_registers_again_has_returned(world: World) -> None:
    again = world.state.agents["node-1"].model_copy(update={"model": None})
    assert noted(world, again.model_copy(update={"sequence": world.state.sequence + 1})) is None
    noted(world, AgentLost(sequence=world.state.sequence + 1, node="node-1", reason="why"))
    found = noted(world, again.model_copy(update={"sequence": world.state.sequence + 1}))
    assert found == JobEvent(False, Reason.AGENT_RETURNED, "node-1 is back")


def test_more_rounds_are_no_resumption(world: World) -> None:
    spec = world.state.spec
    longer = spec.model_copy(update={"rounds": spec.rounds.model_copy(update={"count": 99})})
    suspended = spec.model_copy(update={"suspend": True})
    reasons = [
        found.reason
        for generation, change in enumerate((longer, suspended, longer), 2)
        if (found := noted(world, SpecChanged(generation=generation, spec=change)))
    ]
    assert reasons == [Reason.ACCEPTED, Reason.SUSPENDED, Reason.RESUMED]


def test_equal_scores_are_reported(world: World) -> None:
    plan = PlanMade(
        version=1,
        reason="nodes measured",
        nodes=dict.fromkeys(world.nodes, PLAN),
        left_out={},
        selected=tuple(PLAN.ranks),
        scores=dict.fromkeys(PLAN.ranks, 0.0),
        considered=tuple(world.nodes),
    )
    found = noted(world, plan)
    assert found is not None
    assert (found.warning, found.reason) == (True, Reason.IMPORTANCE_INVALID)


def test_a_slow_precision_is_a_warning_with_its_factor(world: World) -> None:
    kernel = KernelResult(precision=Precision.BF16, usable=True, seconds=0.09, float32_seconds=0.01)
    for node in world.nodes[1:]:
        agent = world.state.agents[node]
        device = agent.device.model_copy(update={"kernels": (kernel,)})
        world.state.agents[node] = agent.model_copy(update={"device": device})
    plan = PlanMade(
        version=1,
        reason="nodes registered",
        nodes=dict.fromkeys(world.nodes, PLAN.model_copy(update={"precision": Precision.BF16})),
        left_out={},
        selected=tuple(PLAN.ranks),
        scores={},
        considered=world.state.live,
    )
    text = f"3 of 3 nodes fit; {world.nodes[1]} and 1 more: bf16 is 13 times slower than fp32 there (nodes registered)"
    assert noted(world, plan) == JobEvent(True, Reason.PLANNED, text)
