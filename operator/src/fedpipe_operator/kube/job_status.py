# SPDX-License-Identifier: Apache-2.0
"""The status that the API server gets: the engine's, with what only Kubernetes knows; and when it is due."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from fedpipe_api.conditions import (
    ACCEPTED,
    OUTPUT,
    READY,
    RECONCILING,
    STALLED,
    TRACKED,
    Condition,
    Reason,
    set_condition,
)
from fedpipe_api.job import FedPipeJob
from fedpipe_api.status import AdapterStatus, FedPipeJobStatus, NodeStatus, Phase

from ..engine.decide import Wait
from ..engine.jobs import Job
from ..engine.quarantine import Quarantine
from ..engine.status import NODE_ROWS
from ..engine.status import status as engine_status
from .node_selection import NodeSelection
from .views import PodView

WRITES_PER_ROUND = 2
"""Status writes that a round without trouble may cost; with its Event that makes three."""

METRIC_SECONDS = 10.0
"""The second write of a round waits so long for more nodes to report the metric."""

OTHER_SECONDS = 60.0
"""And so long for anything else."""

SPACING_SECONDS = 2.0
"""Pause between two writes of a job's status, whatever happens."""

_ORDINARY = {Reason.ROUND_OPEN, Reason.ROUND_DONE, Reason.AGGREGATING, Reason.PROFILING, Reason.PLANNED}
_STANDING = {Reason.INVALID: "spec is invalid", Reason.QUARANTINED: "quarantined"}
_NO_NODES = (Reason.NO_MATCHING_NODES, Reason.NOT_ENOUGH_NODES)


@dataclass(frozen=True)
class OutputResult:
    """What became of spec.output."""

    written: bool
    message: str


@dataclass(frozen=True)
class TrackingResult:
    """What became of spec.tracking; `at` is when that was last seen, in seconds since the epoch."""

    reason: Reason
    message: str
    at: float = field(compare=False)


def job_status(
    job: FedPipeJob,
    known: Job,
    *,
    pods: Sequence[PodView],
    choice: NodeSelection | None,
    refused: str | None,
    output: OutputResult | None,
    tracking: TrackingResult | None,
    previous: FedPipeJobStatus | None,
    now: float,
) -> FedPipeJobStatus:
    """Return the job's status.

    Args:
        job: as the API server has it.
        known: the engine's job.
        pods: the job's Pods; their troubles are shown with their nodes.
        choice: who may take part; those left out are shown with the reason.
        refused: why the API server refuses the job's Pods, if it does.
        output: what became of spec.output; None where it is not due or not asked for.
        tracking: what became of spec.tracking; None likewise.
        previous: the status written last, whose transition times are kept.
        now: seconds since the epoch.
    """
    state = known.state
    progress = {node: live.progress for node, live in known.live.items() if live.progress}
    wait = known.wait
    if wait is not None and wait.reason in _NO_NODES and choice is not None:
        text = choice.explain()
        if wait.reason is Reason.NOT_ENOUGH_NODES:
            text = f"spec.nodes.min is {job.spec.nodes.min}, but {text}"
        wait = Wait(wait.reason, text, wait.until)
    if refused is not None:
        wait = Wait(Reason.INVALID, refused)
    conditions = previous.conditions if previous else ()
    accepted = (refused is None, Reason.INVALID if refused else Reason.ACCEPTED, refused or "")
    conditions = set_condition(conditions, _condition(ACCEPTED, accepted, job.metadata.generation, now))
    if output is not None:
        reason = Reason.OUTPUT_WRITTEN if output.written else Reason.OUTPUT_FAILED
        conditions = set_condition(
            conditions,
            _condition(OUTPUT, (output.written, reason, output.message), job.metadata.generation, now),
        )
    if tracking is not None:
        fact = (tracking.reason is Reason.ROUNDS_TRACKED, tracking.reason, tracking.message)
        conditions = set_condition(conditions, _condition(TRACKED, fact, job.metadata.generation, now))
    found = engine_status(state, wait, progress, conditions)
    changes: dict[str, object] = {
        "observed_generation": job.metadata.generation,
        "node_table": _rows(found.node_table, pods, choice),
    }
    if found.adapter is not None and output is not None and output.written:
        changes["adapter"] = AdapterStatus(
            digest=found.adapter.digest, round=found.adapter.round, path=output.message[:2048]
        )
    return found.model_copy(update=changes)


def invalid_status(
    message: str, generation: int | None, previous: FedPipeJobStatus | None, now: float
) -> FedPipeJobStatus:
    """Return the status of a job whose spec cannot be read; a job that runs goes on as it was."""
    return _standing_still(Reason.INVALID, message, generation, previous, now)


def quarantined_status(
    found: Quarantine, job: FedPipeJob, previous: FedPipeJobStatus | None, now: float
) -> FedPipeJobStatus:
    """Return the status of a job whose records are damaged: what it was before, and why it stands still."""
    text = f"record {found.key}: {found.reason}"
    return _standing_still(Reason.QUARANTINED, text, job.metadata.generation, previous, now)


def _standing_still(
    reason: Reason, text: str, generation: int | None, previous: FedPipeJobStatus | None, now: float
) -> FedPipeJobStatus:
    before = previous or FedPipeJobStatus(phase=Phase.PENDING)
    conditions = before.conditions
    for kind in (ACCEPTED, READY, RECONCILING, STALLED):
        new = _condition(kind, (kind == STALLED, reason, text), generation, now)
        conditions = set_condition(conditions, new)
    changes: dict[str, object] = {
        "observed_generation": generation,
        "message": f"{_STANDING[reason]}: {text}"[:1024],
        "eta": "",
        "conditions": conditions,
    }
    return before.model_copy(update=changes)


def _condition(kind: str, fact: tuple[bool, Reason, str], generation: int | None, now: float) -> Condition:
    true, reason, message = fact
    return Condition(
        type=kind,
        status="True" if true else "False",
        reason=reason,
        message=message,
        last_transition_time=_time(now),
        observed_generation=generation,
    )


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(int(seconds), UTC)


def _rows(
    table: tuple[NodeStatus, ...], pods: Sequence[PodView], choice: NodeSelection | None
) -> tuple[NodeStatus, ...]:
    """Add the Pods' troubles, and the nodes that the selector matches but that cannot be used."""
    by_node = {pod.node: pod for pod in pods}
    rows = [row.model_copy(update={"message": _said(row, by_node.get(row.name))}) for row in table]
    excluded: Mapping[str, str] = choice.excluded if choice else {}
    shown = {row.name for row in rows}
    rows += [
        NodeStatus(name=name, state="left out", message=reason[:1024])
        for name, reason in sorted(excluded.items())
        if name not in shown
    ]
    return tuple(rows[:NODE_ROWS])


def _said(row: NodeStatus, pod: PodView | None) -> str | None:
    """Return what a node's row says: of an agent that does not work, why its Pod does not."""
    if pod is None:
        return row.message
    if row.state in ("lost", "starting"):
        return (pod.trouble or pod.restarted or row.message or "")[:1024] or None
    return row.message or (pod.restarted or pod.unresized or "")[:1024] or None


class WriteBudget:
    """Decides when a job's status is written: news at once, the ordinary course of a round at most twice."""

    def __init__(self, written: FedPipeJobStatus | None) -> None:
        self.written = written
        self._at = 0.0
        self._round = written.round if written else -1
        self._writes = 0

    def delay(self, new: FedPipeJobStatus, now: float) -> float | None:
        """Return the seconds until `new` should be written; None when that is not foreseen."""
        if new == self.written:
            return None
        spaced = max(0.0, self._at + SPACING_SECONDS - now)
        if self.written is None or is_news(self.written, new) or new.round != self._round:
            return spaced
        if self._writes < WRITES_PER_ROUND:
            pause = METRIC_SECONDS if new.metric != self.written.metric else OTHER_SECONDS
            return max(0.0, self._at + pause - now)
        return None

    def wrote(self, new: FedPipeJobStatus, now: float) -> None:
        """Take note of a write."""
        if new.round != self._round:
            self._round, self._writes = new.round, 0
        self._writes += 1
        self.written, self._at = new, now


def is_news(old: FedPipeJobStatus, new: FedPipeJobStatus) -> bool:
    """Whether somebody may be waiting to see this change, rather than the ordinary course of a round."""
    in_round = {Phase.TRAINING, Phase.AGGREGATING}
    if old.phase is not new.phase and not {old.phase, new.phase} <= in_round:
        return True
    if (old.observed_generation, _ready(old)) != (new.observed_generation, _ready(new)):
        return True
    return (_standing(old), _lost(old)) != (_standing(new), _lost(new))


def _ready(status: FedPipeJobStatus) -> str:
    return status.nodes.summary if status.nodes else ""


def _lost(status: FedPipeJobStatus) -> set[tuple[str, str | None]]:
    return {(row.name, row.message) for row in status.node_table if row.state == "lost"}


def _standing(status: FedPipeJobStatus) -> set[tuple[str, ...]]:
    """Return the conditions, with the reasons of a normal round counted as one."""
    return {
        (c.type, c.status) if c.reason in _ORDINARY else (c.type, c.status, c.reason, c.message)
        for c in status.conditions
    }
