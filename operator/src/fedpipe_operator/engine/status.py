# SPDX-License-Identifier: Apache-2.0
"""The status that people see: a pure function of the state and what is live."""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from statistics import median

from fedpipe_api import units
from fedpipe_api.base import format_duration
from fedpipe_api.conditions import (
    COMPLETE,
    FAILED,
    PLANNED,
    READY,
    RECONCILING,
    STALLED,
    Condition,
    Reason,
    set_condition,
)
from fedpipe_api.job import Task
from fedpipe_api.policy import is_forbidden
from fedpipe_api.status import (
    AdapterStatus,
    FedPipeJobStatus,
    MatrixScore,
    Metric,
    NodeCounts,
    NodeStatus,
    Phase,
    RoundStatus,
)
from fedpipe_api.wire import STARTING, Progress

from .decide import Wait, metric_value
from .evaluations import evaluation_of
from .privacy import job_epsilon, node_epsilon
from .state import JobState, Round

HISTORY = 50
"""Rounds kept in status; the ledger has all."""

NODE_ROWS = 200
_PLANLESS = (Reason.PLAN_INFEASIBLE, Reason.MODEL_DIFFERS)
MATRIX_ROWS = 500


def status(
    state: JobState,
    wait: Wait | None,
    progress: Mapping[str, Progress],
    previous: tuple[Condition, ...] = (),
) -> FedPipeJobStatus:
    """Return the job's status; `previous` are its conditions before, whose transition times are kept."""
    finished = state.finished
    return FedPipeJobStatus(
        observed_generation=state.generation,
        phase=phase_of(state),
        message=finished.message if finished else (wait.message if wait else "")[:1024],
        rounds=f"{state.done}/{state.spec.rounds.count}",
        round=state.done,
        nodes=_counts(state),
        metric=(metric := metric_of(state)),
        metric_summary="" if metric is None else f"{metric.name}={metric.value:.3f}",
        eta=_eta(state, wait),
        start_time=_time(state.submitted_at),
        completion_time=None if state.finished_at is None else _time(state.finished_at),
        conditions=_conditions(state, wait, previous),
        node_table=tuple(_node(state, node, progress.get(node)) for node in state.offered[:NODE_ROWS]),
        history=tuple(
            round_status(state, known) for known in list(state.rounds.values())[-HISTORY:] if known.result
        ),
        importance=_importance(state),
        epsilon=job_epsilon(state),
        adapter=_adapter(state),
    )


def phase_of(state: JobState) -> Phase:
    """Return the phase (see the state machine in the operator's README)."""
    if state.finished:
        return Phase(state.finished.phase)
    if state.spec.suspend:
        return Phase.SUSPENDED
    if not state.offered:
        return Phase.PENDING
    if state.plan is None:
        return Phase.PLANNING
    if not state.profiling_done:
        return Phase.PROFILING
    current = state.current
    return Phase.AGGREGATING if current and current.closed and not current.result else Phase.TRAINING


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(math.floor(seconds), UTC)


def _counts(state: JobState) -> NodeCounts:
    planned = len(state.plan.nodes) if state.plan else 0
    ready = len(state.planned) if state.plan else len(state.live)
    wanted = planned if state.plan else len(state.offered)
    return NodeCounts(matched=len(state.offered), planned=planned, ready=ready, summary=f"{ready}/{wanted}")


def metric_name(state: JobState) -> str:
    """Return the metric that the job is judged by."""
    if state.spec.rounds.until:
        return state.spec.rounds.until.metric
    return "accuracy" if state.spec.model.task is Task.SEQUENCE_CLASSIFICATION else "loss"


def metric_of(state: JobState) -> Metric | None:
    """Return the latest and best value of the metric that the job is judged by."""
    name = metric_name(state)
    series = [(n, v) for n in range(state.done + 1) if (v := metric_value(state, n, name)) is not None]
    if not series:
        return None
    better = max if name == "accuracy" else min
    best = better(value for _, value in series)
    return Metric(
        name=name, value=series[-1][1], best=best, best_round=next(n for n, v in series if v == best)
    )


def eta_seconds(state: JobState) -> float | None:
    """Return the seconds left if the coming rounds take the median of the last five."""
    done = [r for r in state.rounds.values() if r.result_at is not None][-5:]
    if not done or state.finished:
        return None
    return median((r.result_at or 0) - r.opened_at for r in done) * (state.spec.rounds.count - state.done)


def _eta(state: JobState, wait: Wait | None) -> str:
    seconds = None if state.spec.suspend or _stalled(state, wait) else eta_seconds(state)
    return "" if seconds is None else format_duration(round(seconds))


_STALLED = {
    Reason.INVALID, Reason.NO_MATCHING_NODES, Reason.NOT_ENOUGH_NODES, Reason.QUORUM_LOST,
    Reason.STORE_FULL, Reason.STORE_DAMAGED, Reason.INTERNAL_ERROR, *_PLANLESS,
}  # fmt: skip


def _stalled(state: JobState, wait: Wait | None) -> bool:
    """Whether the job stands still until somebody, or a node that comes back, changes something."""
    if state.finished or state.spec.suspend or wait is None:
        return False
    if wait.reason is Reason.WAITING_FOR_AGENTS:
        return len(set(state.offered) - set(state.lost)) < state.spec.nodes.min
    return wait.reason in _STALLED


def _conditions(state: JobState, wait: Wait | None, previous: tuple[Condition, ...]) -> tuple[Condition, ...]:
    since = _time(state.finished_at or _latest(state))
    finished, suspended, stalled = state.finished, state.spec.suspend, _stalled(state, wait)
    if finished:
        why: tuple[str, str] = (finished.reason, finished.message)
    elif suspended:
        why = (Reason.SUSPENDED, "spec.suspend is true")
    else:
        why = (wait.reason, wait.message) if wait else (Reason.ROUND_OPEN, "")
    succeeded = finished is not None and finished.phase is Phase.SUCCEEDED
    failed = finished is not None and not succeeded
    facts = {
        PLANNED: (state.plan is not None, Reason.PLANNED if state.plan else why[0], ""),
        RECONCILING: (not (finished or suspended or stalled), *why),
        STALLED: (stalled or failed, *why),
        READY: (succeeded, *why),
        COMPLETE: (succeeded, *why),
        FAILED: (failed, *why),
    }
    conditions = previous
    for kind, (true, reason, message) in facts.items():
        condition = Condition(
            type=kind,
            status="True" if true else "False",
            reason=str(reason),
            message=message,
            last_transition_time=since,
            observed_generation=state.generation,
        )
        conditions = set_condition(conditions, condition)
    return conditions


def _latest(state: JobState) -> float:
    current = state.current
    times = [state.submitted_at, state.plan_at, *state.registered_at.values()]
    if current:
        times += [current.opened_at, current.closed_at, current.result_at]
    return max(t for t in times if t is not None)


def _node(state: JobState, name: str, heard: Progress | None) -> NodeStatus:
    plan = state.plan.nodes.get(name) if state.plan else None
    left_out = state.plan.left_out.get(name) if state.plan else None
    last = next((n for n in reversed(state.rounds) if name in state.rounds[n].updates), None)
    manifest = state.rounds[last].updates[name] if last else None
    profile = state.profiles.get(name)
    measured = manifest.step_seconds if manifest else profile.report.step_seconds if profile else None
    peak = manifest.peak_bytes if manifest else profile.report.peak_bytes if profile else None
    ranks = list(plan.ranks.values()) if plan else []
    return NodeStatus(
        name=name,
        state=_node_state(state, name, left_out is not None or is_forbidden(state.lost.get(name)), heard),
        precision=plan.precision if plan else None,
        micro_batch=plan.micro_batch if plan else None,
        accumulation=plan.accumulation if plan else None,
        matrices=len(ranks) if plan else None,
        min_rank=min(ranks, default=None),
        max_rank=max(ranks, default=None),
        limited_by=plan.limited_by if plan else None,
        predicted_bytes=plan.predicted_bytes if plan else None,
        measured_bytes=peak,
        predicted_seconds=plan.predicted_step_seconds if plan else None,
        measured_seconds=measured,
        last_round=last,
        train_loss=manifest.train_loss if manifest else None,
        epsilon=node_epsilon(state, name),
        **_counted(state, name),
        message=state.lost.get(name) or left_out or _killed(state, name) or _capped(state, name),
    )


def _counted(state: JobState, name: str) -> dict[str, int]:
    """Return the counts of a node's rows that are not 0, by the names of their fields."""
    agent = state.agents.get(name)
    return {field: count for field, count in agent.notes.model_dump().items() if count} if agent else {}


def _killed(state: JobState, name: str) -> str | None:
    """Return with how much memory a node is planned again whose agent was killed."""
    limit = state.memory_limit(name)
    if limit is None:
        return None
    again = "to be planned" if name in state.outgrown else "planned"
    return (
        f"killed for memory at {units.memory(state.killed[name])}; {again} again with {units.memory(limit)}"
    )


def _capped(state: JobState, name: str) -> str | None:
    """Return that the node counted for less than it claims in the latest round with its update."""
    results = (known.result for known in reversed(state.rounds.values()))
    check = next((r.checks[name] for r in results if r and name in r.checks), None)
    return check.reason if check and check.capped else None


def _node_state(state: JobState, name: str, left_out: bool, heard: Progress | None) -> str:
    current = state.current
    if left_out:
        return "left out"
    if name in state.lost:
        return "lost"
    if name not in state.agents:
        return heard.state if heard and heard.state in STARTING else "starting"
    if state.finished:
        return "done"
    if current and not current.closed and name in current.updates:
        return "uploaded"
    return heard.state if heard else "ready"


def round_status(state: JobState, known: Round) -> RoundStatus:
    """Return one aggregated round; loss and accuracy are of the adapter that it ended with."""
    assert known.result is not None
    assert known.closed is not None
    number = known.opened.round
    found = evaluation_of(state, number)
    checks = known.result.checks
    return RoundStatus(
        round=number,
        updates=len(known.updates),
        loss=found.loss if found else None,
        accuracy=found.accuracy if found else None,
        seconds=(known.result_at or 0) - known.opened_at,
        bytes_up=sum(manifest.size for manifest in known.updates.values()),
        bytes_down=known.closed.bytes_down,
        relative_error=known.result.relative_error,
        discarded_energy=known.result.discarded_energy,
        effective_rank=known.result.effective_rank,
        flagged=tuple(sorted(n for n, c in checks.items() if c.verdict in ("flagged", "rejected")))[:100],
    )


def _importance(state: JobState) -> tuple[MatrixScore, ...]:
    if state.plan is None or not state.plan.scores:
        return ()
    chosen = set(state.plan.selected)
    ranked = sorted(state.plan.scores.items(), key=lambda item: (-item[1], item[0]))
    rows = (MatrixScore(matrix=name, score=score, selected=name in chosen) for name, score in ranked)
    return tuple(rows)[:MATRIX_ROWS]


def _adapter(state: JobState) -> AdapterStatus | None:
    blob = state.adapter
    return None if blob is None else AdapterStatus(digest=f"sha256:{blob.digest}", round=state.done)
