# SPDX-License-Identifier: Apache-2.0
"""What each node has spent of the job's privacy budget: a fold over the records, counted upwards.

A round is charged in full when it opens, and again whenever its node may train it again: an attempt counts
even if nothing of it arrived.
"""

from fedpipe_api.accounting import Steps, epsilon

from ..planner import steps_of
from .state import JobState

SLACK = 1e-9
"""Relative rounding of a sum of Rényi divergences."""


class BudgetSpent(Exception):
    """Too few nodes have budget for another round; the message says which and why."""


def spent(state: JobState, node: str) -> tuple[Steps, ...]:
    """Return the private steps that a node is charged with, in a fixed order."""
    return tuple(Steps(*key, steps) for key, steps in sorted(state.charged.get(node, {}).items()))


def node_epsilon(state: JobState, node: str) -> float | None:
    """Return ε that a node has spent; None for a job without privacy."""
    privacy = state.spec.privacy
    return None if privacy is None else epsilon(spent(state, node), privacy.delta)


def job_epsilon(state: JobState) -> float | None:
    """Return the largest ε that a node has spent: rows of different nodes do not add up."""
    if state.spec.privacy is None:
        return None
    return max((epsilon(spent(state, node), state.spec.privacy.delta) for node in state.charged), default=0.0)


def overspending(state: JobState) -> set[str]:
    """Return the planned nodes whose planned noise is too little for the rounds left."""
    privacy = state.spec.privacy
    if privacy is None or state.plan is None:
        return set()
    left = state.spec.rounds.count - state.done
    found = set()
    for node in state.planned:
        more = steps_of(state.plan.nodes[node], state.agents[node].samples, left)
        if epsilon((*spent(state, node), more), privacy.delta) > privacy.epsilon * (1 + SLACK):
            found.add(node)
    return found
