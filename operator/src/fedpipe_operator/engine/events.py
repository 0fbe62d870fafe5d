# SPDX-License-Identifier: Apache-2.0
"""What a person would want to know of a record: the text of Events and log lines."""

from dataclasses import dataclass

from fedpipe_api import units
from fedpipe_api.conditions import Reason
from fedpipe_api.policy import is_forbidden
from fedpipe_api.status import Phase

from ..planner import slow_line
from .evaluations import evaluation_of
from .records import (
    AgentLost,
    AgentRegistered,
    Finished,
    PlanMade,
    Record,
    RoundAggregated,
    RoundClosed,
    SpecChanged,
    UpdateDropped,
)
from .state import JobState


@dataclass(frozen=True)
class JobEvent:
    """One Event."""

    warning: bool
    reason: Reason
    message: str


@dataclass(frozen=True)
class Before:
    """What an Event needs of the state before its record."""

    suspended: bool
    lost: frozenset[str]

    @staticmethod
    def of(state: JobState) -> "Before":
        """Return that part of a state."""
        return Before(state.spec.suspend, frozenset(state.lost))


def event_of(state: JobState, record: Record, before: Before) -> JobEvent | None:
    """Return the Event for a record that was just applied to the state, or None."""
    match record:
        case AgentRegistered() if record.node in before.lost:
            return JobEvent(False, Reason.AGENT_RETURNED, f"{record.node} is back")
        case PlanMade():
            return _planned(state, record)
        case AgentLost() if is_forbidden(record.reason):
            why = record.reason.replace(f"{Reason.POLICY_FORBIDS}: ", "", 1)
            return JobEvent(True, Reason.POLICY_FORBIDS, f"{record.node}: {why}")
        case AgentLost():
            reason = Reason.AGENT_FAILED if record.failed else Reason.AGENT_LOST
            return JobEvent(True, reason, f"{record.node}: {record.reason}")
        case UpdateDropped():
            text = f"round {record.round}: the update of {record.node} was damaged and is sent again"
            return JobEvent(True, Reason.STORE_DAMAGED, text)
        case RoundClosed() if record.stragglers:
            node, steps = min(record.stragglers.items())
            more = f" and {len(record.stragglers) - 1} more" if len(record.stragglers) > 1 else ""
            text = f"{node}{more} missed round {record.round} (last heard of at step {steps})"
            return JobEvent(True, Reason.STRAGGLER, text)
        case RoundAggregated():
            return _round_done(state, record)
        case SpecChanged():
            return _changed(record, before)
        case Finished():
            return JobEvent(record.phase is Phase.FAILED, Reason(record.reason), record.message)
        case _:
            return None


def _changed(record: SpecChanged, before: Before) -> JobEvent:
    if record.spec.suspend != before.suspended:
        suspended = record.spec.suspend
        reason = Reason.SUSPENDED if suspended else Reason.RESUMED
        return JobEvent(False, reason, "suspended" if suspended else "resumed")
    return JobEvent(False, Reason.ACCEPTED, f"spec changed to generation {record.generation}")


def _round_done(state: JobState, record: RoundAggregated) -> JobEvent:
    bad = {node: check for node, check in record.checks.items() if check.verdict in ("flagged", "rejected")}
    if bad:
        node, check = min(bad.items())
        reason = Reason.UPDATE_REJECTED if check.verdict == "rejected" else Reason.UPDATE_FLAGGED
        return JobEvent(
            True, reason, f"round {record.round}: update of {node} {check.verdict}: {check.reason}"
        )
    known = state.rounds[record.round]
    up = sum(manifest.size for manifest in known.updates.values())
    took = (known.result_at or 0) - known.opened_at
    text = f"round {record.round}: {len(known.updates)} updates, {units.transfer(up)} up, {took:.1f} s"
    capped = sorted(node for node, check in record.checks.items() if check.capped)
    if capped:
        text += f"; {len(capped)} counted for less than claimed, first {capped[0]}"
    before = evaluation_of(state, record.round - 1)
    if before is not None:
        text += f"; before it loss {before.loss:.4f}"
        if before.accuracy is not None:
            text += f", accuracy {before.accuracy:.3f}"
    return JobEvent(False, Reason.ROUND_DONE, text)


def _planned(state: JobState, record: PlanMade) -> JobEvent | None:
    before = state.plans.get(record.version - 1)
    if before and before.left_out == record.left_out and _work(before) == _work(record):
        return None  # only its predictions moved
    if len(record.scores) > 1 and len(set(record.scores.values())) == 1:
        return JobEvent(
            True, Reason.IMPORTANCE_INVALID, "all matrices score the same, so the selection is arbitrary"
        )
    text = f"{len(record.nodes)} of {len(record.considered)} nodes fit"
    if record.left_out:
        node, why = min(record.left_out.items())
        text += f"; {node} left out: {why}"
    slow = {
        node: why
        for node, made in record.nodes.items()
        if node in state.agents and (why := slow_line(state.agents[node].device, made.precision))
    }
    if slow:
        node, why = min(slow.items())
        more = f" and {len(slow) - 1} more" if len(slow) > 1 else ""
        text += f"; {node}{more}: {why}"
    reason = Reason.PLANNED if record.version == 1 else Reason.REPLANNED
    return JobEvent(bool(slow), reason, f"{text} ({record.reason})")


def _work(plan: PlanMade) -> dict[str, tuple[object, ...]]:
    return {
        node: (made.precision, made.micro_batch, made.accumulation, made.ranks, made.local_steps)
        for node, made in plan.nodes.items()
    }
