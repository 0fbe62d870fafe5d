# SPDX-License-Identifier: Apache-2.0
"""What the server does with a round's mean change S: FedAvg, FedAvgM, FedAdam (METHOD §4).

`none`: x ← x + η S. `fedavgm` (Hsu et al. 2019): M ← β M + S, x ← x + η M. `fedadam` (Reddi et al. 2021, with
Adam's bias correction): M ← β M + (1−β) S, v ← 0.99 v + 0.01 S², x ← x + η M̂ / (√v̂ + 10⁻³).

In factor space x is the matrix G = B·A itself, never its factors: they are fixed only up to an invertible
matrix, so a state of their entries would mean nothing. M is a low-rank sum like G, cut to maxGlobalRank
every round. S² entry by entry would need the dense matrix and a basis, so FedAdam keeps one second moment a
matrix there: the mean of the squared entries, ‖S‖_F²/(d·c). All entries of a matrix share one step, which
is a layer-wise adaptive rate. Task heads, and the factors under `zero-pad` and `average` (where they are
averaged as plain tensors), have it entry by entry.
"""

from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from fedpipe_api.job import ServerOptimizer

from .factors import Float64

MOMENTUM, SECOND_MOMENT, STEPS = ".momentum", ".second_moment", ".steps"
SUFFIXES = (MOMENTUM, SECOND_MOMENT, STEPS)
"""Of the state's tensors; a momentum in factor space has the names of an adapter's matrix instead."""

_SECOND_DECAY, _TAU = 0.99, 1e-3
_RATES = {"none": 1.0, "fedavgm": 1.0, "fedadam": 1e-3}

Moment = TypeVar("Moment", float, Float64)


@dataclass(frozen=True)
class OptimizerStep(Generic[Moment]):
    """M ← keep·M + new·S, then x ← x + gain·M; `second_moment` is the state's v after the step."""

    keep: float
    new: float
    gain: float | Moment
    second_moment: Moment


def has_momentum(server: ServerOptimizer) -> bool:
    """Return whether the optimizer has a state at all."""
    return server.name != "none"


def adds_the_mean(server: ServerOptimizer) -> bool:
    """Return whether the step is just x ← x + S."""
    return server.name == "none" and server.learning_rate in (None, 1.0)


def has_second_moment(server: ServerOptimizer) -> bool:
    """Return whether the state has a second moment."""
    return server.name == "fedadam"


def advance(
    server: ServerOptimizer, steps: int, second_moment: Moment, square: Moment
) -> OptimizerStep[Moment]:
    """Return one step.

    Args:
        server: the optimizer's settings.
        steps: how many steps came before.
        second_moment: v so far (0 at first).
        square: S², entry by entry or its mean.
    """
    rate = _RATES[server.name] if server.learning_rate is None else server.learning_rate
    if server.name != "fedadam":
        keep = server.momentum if has_momentum(server) else 0.0
        return OptimizerStep(keep, 1.0, rate, second_moment)
    beta = server.momentum
    moment = _SECOND_DECAY * second_moment + (1 - _SECOND_DECAY) * square
    root = np.sqrt(moment / (1 - _SECOND_DECAY ** (steps + 1)))
    return OptimizerStep(beta, 1 - beta, rate / (1 - beta ** (steps + 1)) / (root + _TAU), moment)
