# SPDX-License-Identifier: Apache-2.0
"""The state of a job: a pure fold over its records."""

from collections import Counter
from dataclasses import dataclass, field

from fedpipe_api.job import FedPipeJobSpec
from fedpipe_api.wire import Blob, Evaluation, ModelShape, NodePlan, UpdateManifest

from ..planner import limit_after_kill, steps_of
from .evaluations import Evaluations, evaluation_of
from .records import (
    AgentLost,
    AgentRegistered,
    Begun,
    Evaluated,
    Finished,
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
    UpdateDropped,
)
from .shapes import MODELS, digest_of, majority


@dataclass
class Round:
    """One round: open until `closed`, done once `result` is there. Times are seconds since the epoch."""

    opened: RoundOpened
    opened_at: float
    deadline: float
    updates: dict[str, UpdateManifest] = field(default_factory=dict)
    drops: dict[str, int] = field(default_factory=dict)
    closed: RoundClosed | None = None
    closed_at: float | None = None
    result: RoundAggregated | None = None
    result_at: float | None = None


@dataclass
class JobState:
    """Everything that is known of a job. Only `apply` changes it."""

    uid: str
    namespace: str
    name: str
    spec: FedPipeJobSpec
    generation: int
    submitted_at: float
    active_since: float
    suspended_at: float | None = None
    offered: tuple[str, ...] = ()
    excluded: dict[str, str] = field(default_factory=dict)
    models: dict[str, ModelShape] = field(default_factory=dict)
    """The shapes that most nodes registered, by digest: at most `MODELS`, the plan's always among them."""
    models_of: dict[str, int] = field(default_factory=dict)
    """How many shapes each node brought."""
    agents: dict[str, AgentRegistered] = field(default_factory=dict)
    registered_at: dict[str, float] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    killed: dict[str, int] = field(default_factory=dict)
    """The fewest planned bytes with which each node's agent was killed for memory."""
    plans: dict[int, PlanMade] = field(default_factory=dict)
    plan_at: float | None = None
    profiles: dict[str, Profiled] = field(default_factory=dict)
    profiled_by: dict[str, int] = field(default_factory=dict)
    """The plan in force when each node had measured."""
    given: Blob | None = None
    """The global adapter of round 0, where there is one; nodes download it as it is."""
    rounds: dict[int, Round] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)
    """The round of every update that was accepted, by its digest."""
    evaluations: dict[int, dict[str, Evaluation]] = field(default_factory=dict)
    added: dict[int, "Evaluations | None"] = field(default_factory=dict)
    """What the evaluations of each round but the latest add up to."""
    confusion: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Each node's confusion matrix of `confusion_round`, row by row; earlier rounds' are not kept."""
    confusion_round: int = -1
    charged: dict[str, dict[tuple[float, float], int]] = field(default_factory=dict)
    """Each node's private steps, by noise multiplier and sampling rate."""
    finished: Finished | None = None
    finished_at: float | None = None
    sequence: int = 0

    @property
    def plan(self) -> PlanMade | None:
        """The plan in force."""
        return next(reversed(self.plans.values()), None)

    @property
    def shape(self) -> str | None:
        """The digest of the job's model: the plan's; before there is one, that of most live agents."""
        if self.plan:
            return self.plan.shape
        shape = majority(self.shapes.values())
        return shape if shape in self.models else None

    @property
    def shapes(self) -> dict[str, str]:
        """The digest of each live agent's model."""
        return {node: shape for node in self.live if (shape := self.agents[node].shape) is not None}

    @property
    def model(self) -> ModelShape | None:
        """The shape of the job's model; None while the agents are too few or do not agree."""
        return self.models[self.shape] if self.shape else None

    @property
    def current(self) -> Round | None:
        """The latest round, done or not."""
        return next(reversed(self.rounds.values()), None)

    @property
    def done(self) -> int:
        """Rounds aggregated."""
        current = self.current
        if current is None:
            return 0
        return current.opened.round if current.result else current.opened.round - 1

    @property
    def adapter(self) -> Blob | None:
        """The global adapter after the last aggregated round."""
        known = self.rounds.get(self.done)
        return known.result.adapter if known and known.result else None

    def sent_after(self, round_number: int) -> Blob | None:
        """Return the global adapter of a round as nodes download it; None for round 0 without a given one."""
        if round_number == 0:
            return self.given
        known = self.rounds.get(round_number)
        return (known.result.sent or known.result.adapter) if known and known.result else None

    @property
    def live(self) -> tuple[str, ...]:
        """Offered nodes whose agent registered and is not lost, in order of name."""
        offered = set(self.offered)
        return tuple(n for n in sorted(self.agents) if n in offered and n not in self.lost)

    @property
    def planned(self) -> tuple[str, ...]:
        """Live nodes that the plan gives work."""
        return tuple(n for n in self.live if self.plan and n in self.plan.nodes)

    @property
    def desired(self) -> tuple[str, ...]:
        """Nodes that should have a running agent."""
        if self.finished or self.spec.suspend:
            return ()
        left_out = self.plan.left_out if self.plan else {}
        return tuple(n for n in self.offered if n not in left_out)

    @property
    def profiling_done(self) -> bool:
        """Whether the plan uses measurements: it is not the first one."""
        return self.plan is not None and self.plan.version > 1 and not self.plan.unmeasured

    def memory_limit(self, node: str) -> int | None:
        """Return the bytes that a node may be planned with; None where no agent was killed for memory."""
        killed = self.killed.get(node)
        return None if killed is None else limit_after_kill(killed)

    def outgrew(self, node: str, plan: NodePlan) -> bool:
        """Whether a node's agent was killed with that plan's bytes or fewer, so that it would be again."""
        limit = self.memory_limit(node)
        # The planner's arithmetic may miss its budget by a byte.
        return limit is not None and plan.predicted_bytes > 1.01 * limit

    @property
    def outgrown(self) -> tuple[str, ...]:
        """Live nodes whose agent would be killed for memory by the plan in force; they wait for another."""
        plans = self.plan.nodes if self.plan else {}
        return tuple(node for node in self.planned if self.outgrew(node, plans[node]))


def submitted(uid: str, record: Submitted, at: float) -> JobState:
    """Return the state of a job that was just submitted."""
    return JobState(uid, record.namespace, record.name, record.spec, record.generation, at, at)


def apply(state: JobState, record: Record, at: float) -> None:
    """Change the state by one record; `at` is when it was committed."""
    match record:
        case Submitted():
            raise ValueError("a job is submitted once")
        case SpecChanged():
            _change_spec(state, record, at)
        case Offered():
            state.offered, state.excluded = record.nodes, record.excluded
            state.sequence = record.sequence
        case AgentRegistered():
            _register(state, record, at)
        case AgentLost():
            _lose(state, record)
        case PlanMade():
            # In a ledger of schema 0 every agent has the first one's model.
            known = (
                record
                if record.shape
                else record.model_copy(update={"shape": next(iter(state.models), None)})
            )
            _plan(state, known, at)
        case Begun():
            state.given = record.adapter
        case Profiled():
            state.profiles[record.node] = record
            state.profiled_by[record.node] = state.plan.version if state.plan else 1
        case RoundOpened():
            _open(state, record, at)
            for node in record.participants:
                _charge(state, node)
        case UpdateAccepted():
            state.rounds[record.round].updates[record.node] = record.manifest
            state.accepted[record.manifest.digest] = record.round
        case UpdateDropped():
            _drop(state.rounds[record.round], record)
            _charge(state, record.node)
        case Evaluated():
            _evaluated(state, record)
        case RoundClosed():
            state.rounds[record.round].closed = record
            state.rounds[record.round].closed_at = at
        case RoundAggregated():
            _finish_round(state, record, at)
        case Finished():
            state.finished, state.finished_at = record, at


def _plan(state: JobState, record: PlanMade, at: float) -> None:
    """Put a plan in force. A job may make thousands, so that they share what is large and mostly the same."""
    before = state.plan
    if before is not None:
        nodes = {name: _sharing(plan, before.nodes.get(name)) for name, plan in record.nodes.items()}
        record = record.model_copy(update={"nodes": nodes})
    # Of those before the last, only what each node was given is read again.
    old = state.plans.get(record.version - 2)
    if old is not None:
        nothing: dict[str, object] = {"left_out": {}, "selected": (), "scores": {}, "considered": ()}
        state.plans[old.version] = old.model_copy(update=nothing)
    state.plans[record.version], state.plan_at = record, at


def _lose(state: JobState, record: AgentLost) -> None:
    state.lost[record.node] = record.reason
    state.sequence = record.sequence
    if record.killed_bytes is not None:
        before = state.killed.get(record.node, record.killed_bytes)
        state.killed[record.node] = min(before, record.killed_bytes)


def _open(state: JobState, record: RoundOpened, at: float) -> None:
    opened = Round(record, at, record.deadline, updates=standing_updates(state, record.round))
    before = state.rounds.get(record.round)
    if before is not None:
        # The key of each node's next update is another one's.
        gone = before.updates.keys() - opened.updates.keys()
        opened.drops = before.drops | {node: before.drops.get(node, 0) + 1 for node in sorted(gone)}
    state.rounds[record.round] = opened


def standing_updates(state: JobState, round_number: int) -> dict[str, UpdateManifest]:
    """Return the updates of an open round that the plan in force asks for too; none before it is open."""
    known, plan = state.rounds.get(round_number), state.plan
    if known is None or plan is None:
        return {}
    asked = state.plans[known.opened.plan].nodes
    work = [
        {name: (made.ranks, made.local_steps) for name, made in nodes.items() if name in known.updates}
        for nodes in (asked, plan.nodes)
    ]
    return {
        node: update for node, update in known.updates.items() if work[0].get(node) == work[1].get(node, ())
    }


def _sharing(plan: NodePlan, before: NodePlan | None) -> NodePlan:
    """Return a node's plan with the very ranks of the one before, where they are equal."""
    if before is None or plan.ranks != before.ranks:
        return plan
    return plan.model_copy(update={"ranks": before.ranks})


def _register(state: JobState, record: AgentRegistered, at: float) -> None:
    shape = record.shape
    if record.model is not None:
        shape = shape or digest_of(record.model)
        state.models[shape] = record.model
        state.models_of[record.node] = state.models_of.get(record.node, 0) + 1
    if shape is None:
        shape = next(iter(state.models), None)
    # The shape itself is in `models`.
    state.agents[record.node] = record.model_copy(update={"shape": shape, "model": None})
    state.registered_at[record.node] = at
    state.lost.pop(record.node, None)
    state.sequence = record.sequence
    current = state.current
    # Without an update it trains the open round again.
    if (
        current
        and current.closed is None
        and record.node in {*current.opened.participants} - {*current.updates}
    ):
        _charge(state, record.node)
    if len(state.models) > MODELS:
        held = Counter(state.shapes.values())
        del state.models[min(state.models.keys() - {state.shape}, key=lambda model: (held[model], model))]


def _charge(state: JobState, node: str) -> None:
    """Count a round's private steps of a node; one that has not registered is charged when it does."""
    current, agent = state.current, state.agents.get(node)
    if state.spec.privacy is None or current is None or agent is None:
        return
    plan = state.plans[current.opened.plan].nodes[node]
    noise, rate, steps = steps_of(plan, agent.samples)
    known = state.charged.setdefault(node, {})
    known[noise, rate] = known.get((noise, rate), 0) + steps


def _finish_round(state: JobState, record: RoundAggregated, at: float) -> None:
    state.rounds[record.round].result = record
    state.rounds[record.round].result_at = at
    # A job may have ten thousand rounds: of those before, what is never read again is not kept.
    before = state.rounds.get(record.round - 1)
    if before is not None and before.result is not None:
        before.result = before.result.model_copy(update={"matrices": {}})
    state.added[record.round - 1] = evaluation_of(state, record.round - 1)


def _drop(known: Round, record: UpdateDropped) -> None:
    del known.updates[record.node]
    known.drops[record.node] = record.drops
    known.closed, known.closed_at, known.deadline = None, None, record.deadline


def _evaluated(state: JobState, record: Evaluated) -> None:
    found = record.evaluation
    if found.confusion and found.round >= state.confusion_round:
        if found.round > state.confusion_round:
            state.confusion, state.confusion_round = {}, found.round
        state.confusion[record.node] = found.confusion
    # Of thousands of rounds the matrices would fill the memory.
    kept = found.model_copy(update={"confusion": ()}) if found.confusion else found
    state.evaluations.setdefault(found.round, {})[record.node] = kept
    state.added.pop(found.round, None)


def _change_spec(state: JobState, record: SpecChanged, at: float) -> None:
    if record.spec.suspend and not state.spec.suspend:
        state.suspended_at = at
    elif state.spec.suspend and not record.spec.suspend:
        # Agents were stopped with the suspension; their registrations say nothing of what runs now.
        state.agents.clear()
        state.lost.clear()
        _shift_deadlines(state, at - (state.suspended_at or state.submitted_at))
        state.active_since, state.suspended_at = at, None
    state.spec, state.generation = record.spec, record.generation


def _shift_deadlines(state: JobState, seconds: float) -> None:
    """Move what was running out by the time that the job stood still."""
    if state.plan_at is not None:
        state.plan_at += seconds
    current = state.current
    if current is not None:
        current.deadline += seconds
        if current.result_at is not None:
            current.result_at += seconds


def blobs_in_use(state: JobState) -> set[str]:
    """Return the digests that going on, or reading the result, still needs."""
    return set(kept_blobs(state))


def kept_blobs(state: JobState) -> dict[str, int]:
    """Return the bytes of each blob that is in use, by its digest."""
    keep: dict[str, int] = {}
    for number in (state.done, state.done - 1):
        known = state.rounds.get(number)
        if known and known.result:
            files = (known.result.adapter, known.result.sent, known.result.server_state)
            keep |= {file.digest: file.size for file in files if file}
    if state.given and state.done <= 1:
        keep[state.given.digest] = state.given.size
    current = state.current
    if current and current.result is None:
        keep |= {manifest.digest: manifest.size for manifest in current.updates.values()}
    return keep
