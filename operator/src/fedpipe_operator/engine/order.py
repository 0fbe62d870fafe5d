# SPDX-License-Identifier: Apache-2.0
"""In which order records may come: what is written is checked by the same rules as what is read."""

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
from .state import JobState


class OutOfOrderError(Exception):
    """A record does not follow from those before it."""


def check(state: JobState, record: Record) -> None:
    """Raise OutOfOrderError unless the record may follow in this state."""
    if not _follows(state, record):
        raise OutOfOrderError(f"a record of kind {record.kind} cannot follow those before it")


def _follows(state: JobState, record: Record) -> bool:
    match record:
        case Submitted():
            return False
        case SpecChanged():
            return True
        case Finished():
            return state.finished is None
        case AgentRegistered() | Offered() | AgentLost():
            return record.sequence == state.sequence + 1
        case PlanMade():
            known = record.shape is None or record.shape in state.models
            return known and bool(state.agents) and record.version == len(state.plans) + 1
        case Begun():
            return state.given is None and not state.rounds
        case Profiled():
            return state.plan is not None and record.node not in state.profiles
        case Evaluated():
            reported = state.evaluations.get(record.evaluation.round, {})
            return 0 <= record.evaluation.round <= state.done and record.node not in reported
        case _:
            return _follows_in_round(state, record)


def _follows_in_round(
    state: JobState, record: RoundOpened | UpdateAccepted | UpdateDropped | RoundClosed | RoundAggregated
) -> bool:
    current = state.current
    if isinstance(record, RoundOpened):
        if record.round != state.done + 1 or record.plan not in state.plans:
            return False
        if current is None or current.result is not None:
            return record.again is None
        again = record.again == (current.opened.again or 0) + 1
        return again and current.closed is None and record.plan > current.opened.plan
    if current is None or current.opened.round != record.round or current.result is not None:
        return False
    match record:
        case UpdateAccepted():
            asked = record.node in current.opened.participants
            return asked and current.closed is None and record.node not in current.updates
        case UpdateDropped():
            again = record.drops == current.drops.get(record.node, 0) + 1
            return again and record.node in current.updates
        case RoundClosed():
            return current.closed is None
        case RoundAggregated():
            return current.closed is not None
