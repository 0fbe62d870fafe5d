# SPDX-License-Identifier: Apache-2.0
"""A job's state, its ledger and a clock, moved by hand: no engine, no network, no store."""

from fedpipe_api.wire import AssignmentKind, Blob, Evaluation, NodePlan, Precision, ProfileReport
from fedpipe_operator.engine import accept
from fedpipe_operator.engine.accept import Verdict
from fedpipe_operator.engine.decide import (
    Aggregate,
    CloseRound,
    Finish,
    MakePlan,
    OpenRound,
    Wait,
    assignment,
    decide,
)
from fedpipe_operator.engine.order import check
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
from fedpipe_operator.engine.shapes import digest_of
from fedpipe_operator.engine.state import apply, standing_updates, submitted
from standins.agents import make_update, manifest_of, model_shape, registration
from standins.server import job

SHAPE = model_shape(2)
PLAN = NodePlan(
    precision=Precision.FP32,
    micro_batch=4,
    accumulation=1,
    ranks={m.name: 2 for m in SHAPE.matrices},
    local_steps=2,
    predicted_bytes=10 << 30,
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
        check(self.state, record)
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
                shape=(shape := digest_of(SHAPE)),
                model=None if shape in self.state.models else SHAPE,
            )
        )

    def kill(self, node: str) -> None:
        """Lose an agent that was killed for memory."""
        plan = self.state.plan.nodes.get(node) if self.state.plan else None
        size = plan.predicted_bytes if plan else None
        self.record(
            AgentLost(sequence=self.state.sequence + 1, node=node, reason="killed", killed_bytes=size)
        )

    def plan_of(self, node: str) -> NodePlan:
        """Return what a planner would: lower ranks where an agent was killed for memory."""
        limit = self.state.memory_limit(node)
        if limit is None:
            return PLAN
        return PLAN.model_copy(update={"predicted_bytes": limit, "ranks": dict.fromkeys(PLAN.ranks, 1)})

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
                        shape=self.state.shape,
                        nodes={node: self.plan_of(node) for node in self.state.live},
                        left_out={},
                        selected=tuple(PLAN.ranks),
                        considered=self.state.live,
                        unmeasured=action.unmeasured,
                    )
                )
            case OpenRound():
                assert self.state.plan is not None
                known, stay = self.state.rounds.get(action.round), standing_updates(self.state, action.round)
                opened = RoundOpened(
                    round=action.round,
                    plan=self.state.plan.version,
                    participants=tuple(sorted({*self.state.planned, *stay})),
                    deadline=self.now + self.state.spec.rounds.deadline,
                    again=(known.opened.again or 0) + 1 if known else None,
                )
                self.record(opened)
            case CloseRound():
                known = self.state.rounds[action.round]
                assert len(known.updates) >= self.state.spec.rounds.min_updates
                missing = set(known.opened.participants) - set(known.updates)
                away = set(self.state.lost) | set(self.state.outgrown)
                assert not (missing - away) or self.now >= known.deadline
                closed = RoundClosed(
                    round=action.round,
                    stragglers=dict.fromkeys(missing, 0),
                    bytes_down=0,
                    drops=sum(known.drops.values()) or None,
                )
                self.record(closed)
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
            assert task.plan is not None
            body = make_update(SHAPE, task.plan, node, task.round)
            manifest = manifest_of(body, task.plan, task.round, task.adapter)
            assert accept.update(self.state, node, task.round, manifest) is Verdict.NEW
            drops = self.state.rounds[task.round].drops.get(node)
            self.record(UpdateAccepted(round=task.round, node=node, manifest=manifest, drops=drops))

    def suspend(self, value: bool) -> None:
        if self.state.spec.suspend != value:
            spec = self.state.spec.model_copy(update={"suspend": value})
            self.record(SpecChanged(generation=self.state.generation + 1, spec=spec))

    def settle(self) -> None:
        for _ in range(100):
            if self.state.finished or not self.act():
                return
        raise AssertionError("the engine never comes to rest")


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
