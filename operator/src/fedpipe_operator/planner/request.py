# SPDX-License-Identifier: Apache-2.0
"""What the planner is asked and what it answers."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedpipe_api import wire
from fedpipe_api.job import FedPipeJobSpec

from .calibration import Calibration


@dataclass(frozen=True)
class NodeFacts:
    """A node that could take part.

    Attributes:
        name: of the node.
        device: what its agent found, or what is declared for it.
        samples: to train on.
        evaluation_samples: held out; they are evaluated before training.
        calibration: from measured steps.
        previous: the plan it works by; kept unless another is clearly better.
        limit: bytes it may use at most, runtime included, whatever is free; None for no such limit.
    """

    name: str
    device: wire.DeviceFacts
    samples: int
    evaluation_samples: int = 0
    calibration: Calibration | None = None
    previous: wire.NodePlan | None = None
    limit: int | None = None


@dataclass(frozen=True)
class PlanRequest:
    """A job and its fleet.

    Attributes:
        model: shape of the base model.
        spec: of the job.
        nodes: the candidates, in any order.
        importance: score by matrix, all of them; None before profiling.
        selected: the selection so far, which newcomers must clearly beat.
        headroom: share of free memory, and of the round's deadline, that is not planned.
    """

    model: wire.ModelShape
    spec: FedPipeJobSpec
    nodes: tuple[NodeFacts, ...]
    importance: Mapping[str, float] | None = None
    selected: tuple[str, ...] = ()
    headroom: float = 0.1


@dataclass(frozen=True)
class Plan:
    """Who carries what.

    Attributes:
        nodes: plan by node, sorted by name.
        left_out: why, by node that cannot take part.
        selected: the matrices to train, in the model's order.
        candidates: matrices there were to select from.
        provisional: whether importance is still unknown and the largest matrices stand for those to come.
        deadline: of a round, in seconds.
        budgets: bytes each node may use, runtime included.
        upload_bytes: of each planned node and round.
        under_training: predicted share of planned local steps not done when the round closes.
    """

    nodes: dict[str, wire.NodePlan]
    left_out: dict[str, str]
    selected: tuple[str, ...]
    candidates: int
    provisional: bool
    deadline: float
    budgets: dict[str, int] = field(default_factory=dict)
    upload_bytes: dict[str, int] = field(default_factory=dict)
    under_training: float = 0.0
