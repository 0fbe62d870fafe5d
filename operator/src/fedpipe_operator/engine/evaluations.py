# SPDX-License-Identifier: Apache-2.0
"""What the nodes' evaluations of a round come to together."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .weights import capped

if TYPE_CHECKING:
    from .state import JobState


@dataclass(frozen=True)
class Evaluations:
    """The evaluations of one round added over its nodes."""

    loss: float
    accuracy: float | None
    perplexity: float
    samples: int
    nodes: int


def evaluation_of(state: "JobState", round_number: int) -> Evaluations | None:
    """Return the loss per predicted token (natural log) and accuracy over the held-out samples of a round.

    No node counts for more than its capped share of them.
    """
    if round_number in state.added:
        return state.added[round_number]
    found = dict(sorted(state.evaluations.get(round_number, {}).items()))
    if not found:
        return None
    tokens = capped({node: e.tokens for node, e in found.items()})
    samples = capped({node: e.samples for node, e in found.items()})
    loss = sum(e.loss_sum * (tokens[node] / e.tokens) for node, e in found.items()) / sum(tokens.values())
    accuracy = None
    if all(e.correct is not None for e in found.values()):
        right = sum((e.correct or 0) * (samples[node] / e.samples) for node, e in found.items())
        accuracy = right / sum(samples.values())
    return Evaluations(loss, accuracy, perplexity(loss), sum(e.samples for e in found.values()), len(found))


def perplexity(loss: float) -> float:
    """Return exp(loss), at most what a float can hold."""
    return math.exp(min(loss, 700.0))
