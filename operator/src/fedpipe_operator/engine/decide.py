# SPDX-License-Identifier: Apache-2.0
"""What to do next: pure functions of a job's state and the time."""

from dataclasses import dataclass
from typing import Literal

from fedpipe_api import units
from fedpipe_api.conditions import Reason
from fedpipe_api.status import Phase
from fedpipe_api.wire import Assignment, AssignmentKind

from ..planner import needs_replan
from .evaluations import evaluation_of
from .learning_rate import learning_rate
from .privacy import overspending
from .shapes import difference
from .state import JobState, Round, standing_updates

REGISTRATION_SECONDS = 60.0
"""How long planning waits for offered nodes whose agent has not registered, once enough others have."""

CALIBRATION_STEPS = 3
"""Measured steps of profiling; the first warms up."""


@dataclass(frozen=True)
class Wait:
    """Nothing to do before something changes or `until` (seconds since the epoch) comes."""

    reason: Reason
    message: str
    until: float | None = None


@dataclass(frozen=True)
class MakePlan:
    """Plan again from what is known now."""

    reason: str
    unmeasured: bool = False


@dataclass(frozen=True)
class Begin:
    """Take in the adapter that round 1 starts from."""


@dataclass(frozen=True)
class OpenRound:
    """Begin a round, or the open one again by another plan."""

    round: int


@dataclass(frozen=True)
class CloseRound:
    """Count no more updates; those accepted make the round."""

    round: int


@dataclass(frozen=True)
class Aggregate:
    """Make the round's global adapter."""

    round: int


@dataclass(frozen=True)
class Finish:
    """End the job."""

    phase: Literal[Phase.SUCCEEDED, Phase.FAILED]
    reason: Reason
    message: str


Action = Wait | Begin | MakePlan | OpenRound | CloseRound | Aggregate | Finish


def decide(state: JobState, now: float) -> Action:
    """Return the one next action; the same state and time give the same action."""
    spec = state.spec
    if spec.suspend:
        return Wait(Reason.SUSPENDED, "suspended; set spec.suspend to false to go on")
    deadline = None
    if spec.active_deadline_seconds is not None:
        deadline = state.active_since + spec.active_deadline_seconds
        if now >= deadline:
            text = f"not done {spec.active_deadline_seconds} s after the start (spec.activeDeadlineSeconds)"
            return Finish(Phase.FAILED, Reason.DEADLINE_EXCEEDED, text)
    action = _next(state, now)
    if isinstance(action, Wait) and deadline is not None:
        return Wait(action.reason, action.message, min(action.until or deadline, deadline))
    return action


def _next(state: JobState, now: float) -> Action:
    current = state.current
    if current is not None and current.result is None:
        return Aggregate(current.opened.round) if current.closed else _collect(state, current, now)
    if state.plan is None:
        return _gather(state, now)
    if not state.profiling_done:
        return _profile(state, now)
    stop = _stop(state)
    if stop is not None:
        return _evaluate_last(state, stop, now)
    return _open(state, state.done + 1)


def _open(state: JobState, number: int) -> Action:
    """Open a round by a plan that fits."""
    assert state.plan is not None
    newcomers = set(state.live) - set(state.plan.considered)
    if newcomers:
        return MakePlan(f"{_names(newcomers)} joined")
    if state.outgrown:
        return MakePlan(_killed(state))
    drift = _drift(state)
    if drift:
        return MakePlan(drift)
    short = overspending(state)
    if short:
        return MakePlan(f"{_names(short)} trained a round more than once, or rounds.count grew")
    required = quorum(state)
    ready = set(state.planned) | standing_updates(state, number).keys()
    if len(ready) < required:
        return Wait(Reason.QUORUM_LOST, f"{len(ready)} of {required} required nodes are ready")
    return OpenRound(number)


def _killed(state: JobState) -> str:
    node = state.outgrown[0]
    more = f" and {len(state.outgrown) - 1} more" if len(state.outgrown) > 1 else ""
    return f"{node}{more} was killed for memory at {units.memory(state.killed[node])}"


def quorum(state: JobState) -> int:
    """Return how many updates a round needs."""
    return max(state.spec.rounds.min_updates, 1)


def _names(nodes: set[str] | tuple[str, ...]) -> str:
    shown = sorted(nodes)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")


def _gather(state: JobState, now: float) -> Action:
    """Wait for agents, then plan."""
    spec, live = state.spec, state.live
    if not state.offered:
        return Wait(Reason.NO_MATCHING_NODES, "no node matches spec.nodes.selector and is ready")
    if len(state.offered) < spec.nodes.min:
        text = f"{len(state.offered)} nodes match, spec.nodes.min is {spec.nodes.min}"
        return Wait(Reason.NOT_ENOUGH_NODES, text)
    missing = set(state.offered) - set(live) - set(state.lost)
    until = None
    if len(live) >= spec.nodes.min:
        until = max(state.registered_at[n] for n in live) + REGISTRATION_SECONDS
        if not missing or now >= until:
            if state.shape is None:
                return Wait(Reason.MODEL_DIFFERS, _disagreement(state))
            if spec.adapter.from_ is not None and state.given is None:
                return Begin()
            late = f"{_names(missing)} did not register in time"
            return MakePlan(late if missing else "all agents registered")
    text = f"{len(live)} of {len(state.offered)} agents registered"
    if state.lost:
        node = min(state.lost)
        text += f"; {node}: {state.lost[node]}"
    return Wait(Reason.WAITING_FOR_AGENTS, text, until)


def _disagreement(state: JobState) -> str:
    """Say which nodes have which model, where no model is that of more than half of them."""
    groups: dict[str, list[str]] = {}
    for node, shape in state.shapes.items():
        groups.setdefault(shape, []).append(node)
    if len(groups) == 1:
        return "the model that all nodes have is not kept, as others had more nodes; delete the agents' Pods"
    first, second = sorted(groups.values(), key=lambda nodes: (-len(nodes), nodes))[:2]
    one, other = (state.models.get(state.shapes[nodes[0]]) for nodes in (first, second))
    what = difference(one, other) if one and other else "shape"
    return (
        f"no model is that of more than half of the {len(state.shapes)} nodes: {_names(tuple(first))} and "
        f"{_names(tuple(second))} differ in {what}; correct spec.model on the wrong ones, "
        "or exclude them by spec.nodes.selector"
    )


def _profile(state: JobState, now: float) -> Action:
    """Wait for the planned nodes' measurements, then plan on them."""
    assert state.plan is not None
    assert state.plan_at is not None
    if state.outgrown:
        return MakePlan(_killed(state), unmeasured=True)
    waiting = set(state.planned) - set(state.profiles)
    reported = set(state.profiles) & set(state.plan.nodes)
    if not waiting and len(reported) >= state.spec.nodes.min:
        return MakePlan("nodes measured")
    until = state.plan_at + state.spec.rounds.deadline
    if now >= until and len(reported) >= state.spec.nodes.min:
        return MakePlan(f"{_names(waiting)} not measured in time")
    if not state.planned:
        return Wait(Reason.QUORUM_LOST, "no planned node has a running agent")
    what = "importance, time, memory" if state.spec.adapter.selection.mode == "importance" else "time, memory"
    text = f"{len(reported)} of {len(state.plan.nodes)} nodes measured ({what})"
    return Wait(Reason.PROFILING, text, until if until > now else None)


def _collect(state: JobState, current: Round, now: float) -> Action:
    """Close the round once all participants that still run have delivered, or at its deadline with quorum."""
    opened = current.opened
    stop = _stop(state)
    if stop is not None and stop.reason is not Reason.ROUNDS_COMPLETED:
        return stop
    assert state.plan is not None
    if opened.plan != state.plan.version:
        return _open(state, opened.round)
    waiting = set(opened.participants) - set(current.updates) - set(state.lost) - set(state.outgrown)
    have, need = len(current.updates), quorum(state)
    if have >= need and (not waiting or now >= current.deadline):
        return CloseRound(opened.round)
    if len(waiting) + have < need and state.outgrown:
        return MakePlan(_killed(state))  # without it the round would wait for ever
    if now >= current.deadline or len(waiting) + have < need:
        text = f"round {opened.round} has {have} of {need} required updates"
        return Wait(Reason.QUORUM_LOST, text, current.deadline if now < current.deadline else None)
    text = f"round {opened.round}: {have} of {len(opened.participants)} updates"
    return Wait(Reason.ROUND_OPEN, text, current.deadline)


def _stop(state: JobState) -> Finish | None:
    """Return how the job ends if it ends with the rounds aggregated so far."""
    spec, done = state.spec, state.done
    until = spec.rounds.until
    if until is not None:
        # The latest round counts once all have evaluated it; of older ones no more reports will come.
        ended = range(1, done if awaited_evaluations(state, done) else done + 1)
        known = [(n, v) for n in ended if (v := metric_value(state, n, until.metric)) is not None]
        better = max if until.metric == "accuracy" else min
        if known:
            last, value = known[-1]
            reached = until.reaches is not None and better(value, until.reaches) == value
            if reached:
                text = f"{until.metric} {value:.4g} after round {last} (target {until.reaches:.4g})"
                return Finish(Phase.SUCCEEDED, Reason.TARGET_REACHED, text)
            top = better(v for _, v in known)
            best = next(n for n, v in known if v == top)
            if until.patience is not None and last - best >= until.patience:
                text = f"no better {until.metric} since round {best}"
                return Finish(Phase.SUCCEEDED, Reason.NO_IMPROVEMENT, text)
    if done >= spec.rounds.count:
        return Finish(Phase.SUCCEEDED, Reason.ROUNDS_COMPLETED, f"{done} rounds done")
    return None


def awaited_evaluations(state: JobState, number: int) -> set[str]:
    """Return the running nodes that hold out samples and have not yet evaluated the round."""
    able = {n for n in state.planned if state.agents[n].evaluation_samples} - set(state.outgrown)
    return able - set(state.evaluations.get(number, {}))


def metric_value(state: JobState, number: int, metric: str) -> float | None:
    """Return `accuracy`, `loss` or `perplexity` of a round."""
    found = evaluation_of(state, number)
    return None if found is None else getattr(found, metric)


def _evaluate_last(state: JobState, stop: Finish, now: float) -> Action:
    """Let the final adapter be evaluated before the job ends; a lost node or the deadline ends the wait."""
    assert state.current is not None
    assert state.current.result_at is not None
    until = state.current.result_at + state.spec.rounds.deadline
    waiting = awaited_evaluations(state, state.done)
    if not waiting or now >= until:
        return stop
    return Wait(Reason.ROUND_OPEN, f"{len(waiting)} nodes evaluate the final adapter", until)


def _drift(state: JobState) -> str | None:
    """Return why the plan no longer fits what the last round measured, once per round."""
    current = state.current
    assert state.plan is not None
    if current is None or current.opened.plan != state.plan.version or not current.closed:
        return None
    if current.closed.stragglers:
        return f"{_names(set(current.closed.stragglers))} missed round {current.opened.round}"
    for node, manifest in sorted(current.updates.items()):
        plan = state.plan.nodes.get(node)
        if plan is None:
            continue
        if manifest.micro_batch < plan.micro_batch:
            return f"{node} ran out of memory at micro-batch {plan.micro_batch}"
        why = needs_replan(plan, manifest.step_seconds or None, manifest.peak_bytes)
        if why:
            return f"{node}: {why}"
    return None


def assignment(state: JobState, node: str, now: float) -> Assignment | None:
    """Return a node's work, or None while there is nothing for it yet."""
    if state.finished:
        return Assignment(kind=AssignmentKind.STOP, reason=state.finished.message)
    if node not in state.desired:
        left_out = state.plan.left_out.get(node) if state.plan else None
        return Assignment(kind=AssignmentKind.STOP, reason=left_out or "not wanted by the job any more")
    if state.plan is None or node not in state.plan.nodes:
        return None
    start = state.spec.aggregation.method.start
    current = state.current
    if node in state.outgrown or (
        current and not current.closed and current.opened.plan != state.plan.version
    ):
        return None  # until another plan, or the round is open again by it
    if not state.profiling_done:
        if node in state.profiles:
            return None
        return Assignment(
            kind=AssignmentKind.PROFILE,
            plan=state.plan.nodes[node],
            profile_steps=CALIBRATION_STEPS,
            importance=state.spec.adapter.selection.mode == "importance",
            start=start,
            learning_rate=state.spec.optimizer.learning_rate,
        )
    if current is None:
        return None
    number = current.opened.round
    if current.closed is None and node in current.opened.participants and node not in current.updates:
        return Assignment(
            kind=AssignmentKind.TRAIN,
            round=number,
            plan=state.plan.nodes[node],
            adapter=state.sent_after(number - 1),
            start=start,
            learning_rate=learning_rate(state.spec, number),
            evaluate=node in awaited_evaluations(state, number - 1),
            remaining_seconds=max(0.0, current.deadline - now),
        )
    if current.result and _stop(state) and node in awaited_evaluations(state, number):
        return Assignment(
            kind=AssignmentKind.EVALUATE,
            round=number,
            plan=state.plan.nodes[node],
            adapter=state.sent_after(number),
            start=start,
        )
    return None
