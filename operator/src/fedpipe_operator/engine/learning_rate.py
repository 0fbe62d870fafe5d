# SPDX-License-Identifier: Apache-2.0
"""The learning rate of each round."""

import math

from fedpipe_api.job import FedPipeJobSpec


def learning_rate(spec: FedPipeJobSpec, round_number: int) -> float:
    """Return the learning rate of a round (from 1): linear warm-up, then constant, linear or cosine."""
    optimizer, count = spec.optimizer, spec.rounds.count
    if round_number <= optimizer.warmup_rounds:
        return optimizer.learning_rate * round_number / (optimizer.warmup_rounds + 1)
    passed = (round_number - 1 - optimizer.warmup_rounds) / max(1, count - optimizer.warmup_rounds)
    match optimizer.schedule:
        case "constant":
            factor = 1.0
        case "linear":
            factor = 1 - passed
        case "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * passed))
    return optimizer.learning_rate * factor
