"""The state machine under every order of events, with chance in place of agents."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpipe_api.wire import AssignmentKind, Blob, Evaluation, NodePlan, Precision, ProfileReport
from fedpipe_operator.engine import accept
from fedpipe_operator.engine.accept import Refused, Verdict
from fedpipe_operator.engine.decide import (
    Aggregate,
    CloseRound,
    Finish,
    MakePlan,
    OpenRound,
    Wait,
    assignment,
    decide,
    learning_rate,
)
from fedpipe_operator.engine.records import (
    ADAPTER,
    AgentLost,
    AgentRegistered,
    Evaluated,
    Finished,
    NodeCheck,
    Offered,
    PlanMade,
    Profiled,
    Record,
    RoundAggregated,
    RoundClosed,
    RoundOpened,
    SpecChanged,
    Submitted,
    UpdateAccepted,
)
from fedpipe_operator.engine.state import apply, blobs_in_use, evaluation_of, submitted
from fedpipe_operator.engine.status import phase_of, status
from standins.agents import make_update, manifest_of, model_shape, registration
from standins.server import job

SHAPE = model_shape(2)
PLAN = NodePlan(
    precision=Precision.FP32,
    micro_batch=4,
    accumulation=1,
    ranks={m.name: 2 for m in SHAPE.matrices},
    local_steps=2,
    predicted_bytes=1,
    predicted_step_seconds=1,
    predicted_round_seconds=2,
    limited_by="ranks",
)


class World:
    """A job's state, its ledger and a clock."""

    def __init__(self, nodes: int, minimum: int, count: int = 3, **rounds: object) -> None:
        self.now = 1000.0
        self.nodes = [f"node-{i}" for i in range(nodes)]
        self.ledger: list[tuple[float, Record]] = []
        spec = job(nodes, count).spec
        spec = spec.model_copy(
            update={
                "rounds": spec.rounds.model_copy(update={"min_updates": minimum, **rounds}),
                "nodes": spec.nodes.model_copy(update={"min": minimum}),
            }
        )
        self.first = Submitted(namespace="default", name="test", generation=1, spec=spec)
        self.state = submitted("uid", self.first, self.now)
        self.record(Offered(sequence=1, nodes=tuple(self.nodes)))

    def record(self, record: Record) -> None:
        assert record.key not in {known.key for _, known in self.ledger}, "the ledger refuses duplicates"
        assert ADAPTER.validate_json(record.to_json()) == record, "what is written can be read"
        self.ledger.append((self.now, record))
        apply(self.state, record, self.now)

    def register(self, node: str) -> None:
        message = registration(SHAPE)
        self.record(
            AgentRegistered(
                sequence=self.state.sequence + 1,
                node=node,
                device=message.device,
                samples=100,
                evaluation_samples=10,
                model=SHAPE if self.state.model is None else None,
            )
        )

    def act(self) -> bool:
        """Do what the engine would; False when it waits."""
        action = decide(self.state, self.now)
        assert decide(self.state, self.now) == action
        match action:
            case Wait():
                return False
            case MakePlan():
                version = self.state.plan.version + 1 if self.state.plan else 1
                self.record(
                    PlanMade(
                        version=version,
                        reason=action.reason,
                        nodes=dict.fromkeys(self.state.live, PLAN),
                        left_out={},
                        selected=tuple(PLAN.ranks),
                        considered=self.state.live,
                    )
                )
            case OpenRound():
                assert self.state.plan is not None
                self.record(
                    RoundOpened(
                        round=action.round,
                        plan=self.state.plan.version,
                        participants=self.state.planned,
                        deadline=self.now + self.state.spec.rounds.deadline,
                    )
                )
            case CloseRound():
                known = self.state.rounds[action.round]
                assert len(known.updates) >= self.state.spec.rounds.min_updates
                missing = set(known.opened.participants) - set(known.updates)
                assert not (missing - set(self.state.lost)) or self.now >= known.deadline
                self.record(
                    RoundClosed(round=action.round, stragglers=dict.fromkeys(missing, 0), bytes_down=0)
                )
            case Aggregate():
                self.record(
                    RoundAggregated(
                        round=action.round,
                        adapter=Blob(digest=f"{action.round:064x}", size=1),
                        matrices={},
                        checks={"node-0": NodeCheck(norm=1, verdict="ok", reason="")},
                        relative_error=0,
                        discarded_energy=0,
                        effective_rank=1,
                        seconds=0,
                    )
                )
            case Finish():
                self.record(Finished(phase=action.phase, reason=action.reason, message=action.message))
        return True

    def work(self, node: str) -> None:
        """Let an agent do what it is asked."""
        task = assignment(self.state, node, self.now)
        if task is None or task.kind is AssignmentKind.STOP:
            return
        if task.kind is AssignmentKind.PROFILE:
            scores = {m.name: 1.0 for m in SHAPE.matrices}
            report = ProfileReport(step_seconds=1, peak_bytes=1, micro_batch=4, scores=scores)
            assert accept.profile(self.state, node, report) is Verdict.NEW
            self.record(Profiled(node=node, report=report))
        elif task.kind is AssignmentKind.EVALUATE or task.evaluate:
            number = task.round if task.kind is AssignmentKind.EVALUATE else task.round - 1
            message = Evaluation(
                round=number, samples=10, tokens=10, loss_sum=10, correct=number, precision=Precision.FP32
            )
            assert accept.evaluation(self.state, node, message) is Verdict.NEW
            self.record(Evaluated(node=node, evaluation=message))
        else:
            manifest = manifest_of(make_update(SHAPE, PLAN, node, task.round), PLAN)
            assert accept.update(self.state, node, task.round, manifest) is Verdict.NEW
            self.record(UpdateAccepted(round=task.round, node=node, manifest=manifest))

    def suspend(self, value: bool) -> None:
        if self.state.spec.suspend != value:
            spec = self.state.spec.model_copy(update={"suspend": value})
            self.record(SpecChanged(generation=self.state.generation + 1, spec=spec))

    def settle(self) -> None:
        for _ in range(100):
            if self.state.finished or not self.act():
                return
        raise AssertionError("the engine never comes to rest")


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["register", "work", "work", "work", "lose", "tick", "suspend", "resume"]),
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


def ready(nodes: int = 3, minimum: int = 2, **rounds: object) -> World:
    """A world whose first round is open."""
    world = World(nodes, minimum, **rounds)
    for node in world.nodes:
        world.register(node)
    world.settle()
    for node in world.nodes:
        world.work(node)
    world.settle()
    assert world.state.current
    return world


def deliver(world: World, node: str) -> None:
    """Let a node evaluate, if it is to, and deliver."""
    world.work(node)
    if assignment(world.state, node, world.now):
        world.work(node)


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
    world.record(Offered(sequence=50, nodes=("node-0", "node-1", "node-2", "node-9")))
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


def test_another_model_is_refused_with_the_field_that_differs() -> None:
    world = World(2, 1)
    world.register("node-0")
    other = registration(SHAPE.model_copy(update={"layers": 7}))
    with pytest.raises(Refused, match="has another layers than the other nodes'"):
        accept.registration(world.state, "node-1", other)
