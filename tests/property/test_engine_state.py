# SPDX-License-Identifier: Apache-2.0
"""The state machine under every order of events, with chance in place of agents."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpipe_api.wire import AssignmentKind, Evaluation, Precision, ProfileReport
from fedpipe_operator.engine import accept
from fedpipe_operator.engine.accept import Refused, Verdict
from fedpipe_operator.engine.decide import (
    CloseRound,
    Finish,
    MakePlan,
    Wait,
    assignment,
    decide,
    learning_rate,
)
from fedpipe_operator.engine.evaluations import evaluation_of
from fedpipe_operator.engine.records import (
    AgentLost,
    Evaluated,
    Offered,
    SpecChanged,
)
from fedpipe_operator.engine.state import apply, blobs_in_use, submitted
from fedpipe_operator.engine.status import phase_of, status
from standins.agents import make_update, manifest_of, registration
from standins.server import job
from standins.world import PLAN, SHAPE, World, deliver, ready

EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["register", "work", "work", "work", "lose", "kill", "tick", "suspend", "resume"]),
        st.integers(0, 3),
    ),
    max_size=120,
)


@settings(max_examples=150, deadline=None)
@given(EVENTS, st.integers(1, 4))
def test_any_order_of_events_keeps_the_rules(events: list[tuple[str, int]], minimum: int) -> None:
    world = World(4, minimum)
    for kind, index in events:
        if world.state.finished:
            break
        node = world.nodes[index]
        match kind:
            case "register" if not world.state.spec.suspend:
                world.register(node)
            case "work" if node in world.state.live:
                world.work(node)
            case "lose" if node in world.state.agents and node not in world.state.lost:
                world.record(AgentLost(sequence=world.state.sequence + 1, node=node, reason="gone"))
            case "kill" if node in world.state.live:
                world.kill(node)
            case "tick":
                world.now += 200
            case "suspend":
                world.suspend(True)
            case "resume":
                world.suspend(False)
        world.now += 1
        world.settle()
        status(world.state, None, {})
        check_rules(world)
    # Whatever happened, with all agents back and working the job ends well.
    world.suspend(False)
    for node in world.nodes:
        if not world.state.finished:
            world.register(node)
    for _ in range(200):
        world.settle()
        if world.state.finished:
            break
        world.now += 1
        for node in world.nodes:
            if node in world.state.live:
                world.work(node)
                world.settle()
    assert world.state.finished
    assert world.state.finished.phase == "Succeeded"
    assert world.state.done == 3


def check_rules(world: World) -> None:
    state = world.state
    numbers = sorted(state.rounds)
    assert numbers == list(range(1, len(numbers) + 1))
    for number in numbers[:-1]:
        assert state.rounds[number].result is not None
    replayed = submitted("uid", world.first, 1000.0)
    for at, record in world.ledger:
        apply(replayed, record, at)
    assert replayed == state, "the state is what the ledger says, nothing else"
    current = state.current
    if current and not current.result:
        for manifest in current.updates.values():
            assert manifest.digest in blobs_in_use(state)
    if state.adapter:
        assert state.adapter.digest in blobs_in_use(state)


def test_a_round_closes_the_moment_its_last_update_is_there() -> None:
    world = ready()
    for node in world.nodes[:2]:
        deliver(world, node)
        assert isinstance(decide(world.state, world.now), Wait)
    deliver(world, world.nodes[2])
    assert decide(world.state, world.now) == CloseRound(1)


def test_a_lost_agent_is_not_waited_for_but_quorum_is() -> None:
    world = ready(minimum=3)
    for node in world.nodes[:2]:
        deliver(world, node)
    world.record(AgentLost(sequence=world.state.sequence + 1, node="node-2", reason="gone"))
    waiting = decide(world.state, world.now)
    assert isinstance(waiting, Wait)
    assert waiting.reason == "QuorumLost"
    world.now += 10_000
    assert isinstance(decide(world.state, world.now), Wait), "never fewer updates than minUpdates"
    world.register("node-2")
    deliver(world, "node-2")
    assert decide(world.state, world.now) == CloseRound(1)


def test_a_node_killed_for_memory_is_planned_with_less_at_the_rounds_end() -> None:
    world = ready()
    for node in world.nodes[:2]:
        deliver(world, node)
    world.kill("node-2")
    world.register("node-2")
    assert assignment(world.state, "node-2", world.now) is None, "it would be killed again"
    assert decide(world.state, world.now) == CloseRound(1)
    world.act()
    world.act()
    assert decide(world.state, world.now) == MakePlan("node-2 was killed for memory at 10.0 GiB")
    world.settle()
    assert world.state.current
    assert world.state.current.opened.round == 2
    work = assignment(world.state, "node-2", world.now)
    assert work
    assert work.plan
    assert work.plan.predicted_bytes == 8 << 30
    [row] = [row for row in status(world.state, None, {}).node_table if row.name == "node-2"]
    assert row.message == "killed for memory at 10.0 GiB; planned again with 8.0 GiB"
    world.kill("node-2")
    assert world.state.memory_limit("node-2") == int(0.8 * (8 << 30))
    check_rules(world)


def test_a_round_that_cannot_do_without_a_killed_node_is_opened_again_and_keeps_what_it_has() -> None:
    world = ready(minimum=3)
    deliver(world, "node-0")
    deliver(world, "node-2")
    kept = world.state.rounds[1].updates["node-0"]
    world.kill("node-2")
    world.settle()
    assert world.state.plans.keys() == {1, 2}, "its agent is not back yet"
    late = manifest_of(make_update(SHAPE, PLAN, "node-2", 1), PLAN)
    world.kill("node-1")
    for node in ("node-1", "node-2"):
        world.register(node)
    world.settle()
    current = world.state.current
    assert current
    assert (current.opened.round, current.opened.plan, current.opened.again) == (1, 3, 1)
    assert current.updates == {"node-0": kept}, "the update of node-2 has ranks that it is not asked for now"
    claims = late.model_copy(update={"micro_batch": 5})
    with pytest.raises(Refused, match="opened again by another plan") as refused:
        accept.update(world.state, "node-2", 1, claims)
    assert refused.value.status == 409
    for node in ("node-1", "node-2"):
        deliver(world, node)
    assert decide(world.state, world.now) == CloseRound(1)
    world.settle()
    assert world.state.done == 1
    check_rules(world)


def test_a_node_killed_while_it_measures_measures_again_by_a_smaller_plan() -> None:
    world = World(2, 2)
    for node in world.nodes:
        world.register(node)
    world.settle()
    world.work("node-0")
    world.kill("node-1")
    world.register("node-1")
    world.settle()
    assert not world.state.profiling_done
    work = assignment(world.state, "node-1", world.now)
    assert work
    assert work.plan
    assert (work.kind, work.plan.predicted_bytes) == (AssignmentKind.PROFILE, 8 << 30)
    world.work("node-1")
    world.settle()
    assert world.state.profiling_done
    assert world.state.profiled_by == {"node-0": 1, "node-1": 2}
    check_rules(world)


def test_the_deadline_closes_with_quorum_and_the_straggler_is_answered_with_409() -> None:
    world = ready()
    for node in world.nodes[:2]:
        deliver(world, node)
    deadline = world.state.rounds[1].deadline
    world.now = deadline - 0.001
    assert decide(world.state, world.now) == Wait("RoundOpen", "round 1: 2 of 3 updates", deadline)
    world.now = deadline
    world.act()
    late = manifest_of(make_update(SHAPE, PLAN, "node-2", 1), PLAN)
    with pytest.raises(Refused, match="round 1 is closed; the update of node-2 is dropped") as refused:
        accept.update(world.state, "node-2", 1, late)
    assert refused.value.status == 409
    known = world.state.rounds[1].updates["node-0"]
    assert accept.update(world.state, "node-0", 1, known) is Verdict.KNOWN, "the same bytes again are fine"


def test_standing_still_does_not_eat_the_deadline() -> None:
    world = ready()
    deadline = world.state.rounds[1].deadline
    world.suspend(True)
    world.now += 5000
    assert all(assignment(world.state, n, world.now).kind is AssignmentKind.STOP for n in world.nodes)
    world.suspend(False)
    assert world.state.rounds[1].deadline == deadline + 5000
    assert phase_of(world.state) == "Training"


def test_stragglers_and_newcomers_lead_to_a_new_plan() -> None:
    world = ready()
    for node in world.nodes[:2]:
        deliver(world, node)
    world.now = world.state.rounds[1].deadline
    world.act()
    world.act()
    assert decide(world.state, world.now) == MakePlan("node-2 missed round 1")
    world.settle()
    assert world.state.current
    assert world.state.current.opened.round == 2
    world.record(Offered(sequence=world.state.sequence + 1, nodes=(*world.nodes, "node-9")))
    world.register("node-9")
    for node in world.nodes:
        deliver(world, node)
    world.act()
    world.act()
    assert decide(world.state, world.now) == MakePlan("node-9 joined")


@pytest.mark.parametrize(
    ("until", "reason"),
    [
        ({"metric": "accuracy", "reaches": 0.1}, "TargetReached"),
        ({"metric": "loss", "patience": 1}, "NoImprovement"),
    ],
)
def test_until_ends_the_job_early(until: dict[str, object], reason: str) -> None:
    world = ready(count=10)
    spec = world.state.spec
    rounds = spec.rounds.model_validate(spec.rounds.to_dict() | {"until": until})
    world.record(SpecChanged(generation=2, spec=spec.model_copy(update={"rounds": rounds})))
    for _ in range(20):
        for node in world.nodes:
            world.work(node)
            world.settle()
    assert world.state.finished
    assert world.state.finished.reason == reason
    assert world.state.done < 10


def test_the_active_deadline_fails_the_job() -> None:
    world = World(2, 2)
    spec = world.state.spec.model_copy(update={"active_deadline_seconds": 60})
    world.record(SpecChanged(generation=2, spec=spec))
    waiting = decide(world.state, world.now)
    assert isinstance(waiting, Wait)
    assert waiting.until == 1060.0
    world.now = 1060.0
    finish = decide(world.state, world.now)
    assert isinstance(finish, Finish)
    assert (finish.phase, finish.reason) == ("Failed", "DeadlineExceeded")


def test_evaluations_add_up_over_nodes() -> None:
    world = ready()
    for node, (loss, correct, samples) in zip(world.nodes, [(1.0, 1, 10), (3.0, 9, 30)], strict=False):
        world.record(
            Evaluated(
                node=node,
                evaluation=Evaluation(
                    round=0,
                    samples=samples,
                    tokens=samples,
                    loss_sum=loss * samples,
                    correct=correct,
                    precision=Precision.NF4,
                ),
            )
        )
    found = evaluation_of(world.state, 0)
    assert found is not None
    assert found.loss == pytest.approx((1.0 * 10 + 3.0 * 30) / 40)
    assert found.accuracy == pytest.approx(10 / 40)


@given(st.sampled_from(["constant", "linear", "cosine"]), st.integers(0, 5), st.integers(1, 30))
def test_the_learning_rate_never_leaves_its_bounds(schedule: str, warmup: int, count: int) -> None:
    spec = job(1, count).spec
    optimizer = spec.optimizer.model_copy(update={"schedule": schedule, "warmup_rounds": warmup})
    spec = spec.model_copy(update={"optimizer": optimizer})
    rates = [learning_rate(spec, n) for n in range(1, count + 1)]
    assert all(0 < rate <= optimizer.learning_rate for rate in rates)
    after = rates[warmup:]
    assert after == sorted(after, reverse=True)


def test_a_report_with_a_missing_matrix_is_refused() -> None:
    world = World(1, 1)
    world.register("node-0")
    world.settle()
    report = ProfileReport(step_seconds=1, peak_bytes=1, micro_batch=1, scores={SHAPE.matrices[0].name: 1.0})
    with pytest.raises(Refused, match=r"matrix encoder\.1\.query is missing from the importance report"):
        accept.profile(world.state, "node-0", report)


def test_a_planned_node_cannot_come_back_with_another_model() -> None:
    world = ready()
    other = registration(SHAPE.model_copy(update={"layers": 7}))
    with pytest.raises(Refused, match="has another layers than the other nodes'"):
        accept.registration(world.state, "node-1", other)
