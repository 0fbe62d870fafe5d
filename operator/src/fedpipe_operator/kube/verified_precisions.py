# SPDX-License-Identifier: Apache-2.0
"""Which agent's kernel check a FedPipeNode shows as verified: that of the newest registration on the node."""

from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from fedpipe_api import wire

from ..engine.state import JobState


@dataclass(frozen=True)
class Verification:
    """The kernels that an agent ran on a node before it registered, at Unix time `at`."""

    node: str
    at: float
    kernels: tuple[wire.KernelResult, ...]

    def precisions(self) -> list[dict[str, Any]]:
        """Return them as a FedPipeNode has them.

        One that failed always has a message, which the operator then owns: else the probe's own would be
        there, and the probe may change nothing of a verified entry.
        """
        return [
            kernel.to_dict()
            | {"verified": True}
            | ({} if kernel.usable else {"message": kernel.message or "its kernel failed"})
            for kernel in self.kernels
        ]


class VerifiedPrecisions:
    """What was recorded already. Ended jobs are looked at again and again too: no old result may return."""

    def __init__(self) -> None:
        """Start with nothing recorded, as after a restart."""
        self._recorded: dict[str, float] = {}

    def due(
        self, state: JobState, states: Callable[[], Iterable[JobState]], there: Container[str]
    ) -> Iterator[Verification]:
        """Yield what a job's agents proved and is not recorded, unless another job's registered later.

        `states` gives those of all jobs, asked for only while something is not recorded; `there` are the
        nodes that have a FedPipeNode.
        """
        for node, agent in list(state.agents.items()):
            at, kernels = state.registered_at[node], agent.device.kernels
            if not kernels or node not in there or at <= self._recorded.get(node, 0.0):
                continue
            if all(other.registered_at.get(node, 0.0) <= at for other in states()):
                yield Verification(node, at, kernels)

    def recorded(self, proof: Verification) -> None:
        """Take note that a FedPipeNode shows the proof."""
        self._recorded[proof.node] = proof.at
