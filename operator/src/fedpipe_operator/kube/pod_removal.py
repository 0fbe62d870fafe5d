# SPDX-License-Identifier: Apache-2.0
"""Which agent Pods of a running job are deleted, and so replaced, and when."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..engine.state import JobState
from .node_selection import ClusterNodes
from .views import PodView

REPLACE_SECONDS, LONGEST_REPLACE_SECONDS = 10.0, 300.0
"""Back-off before a Pod that ended is replaced; doubled for each that failed in a row, as a kubelet does."""

STARTING_SECONDS = 120.0
"""A Pod that has not started after so long is a problem, whatever its status says."""

HUNG_SECONDS = 300.0
"""A Pod that runs while its agent has not called for so long is replaced."""

ROLL_SECONDS = 10.0
"""A new template may interrupt a round that is no older than this."""


@dataclass(frozen=True)
class Removal:
    """A Pod to delete; `force` without waiting for a kubelet that is gone."""

    pod: PodView
    reason: str
    force: bool = False


def left_out(state: JobState) -> Mapping[str, str]:
    """Return why the plan gives nodes no work."""
    return state.plan.left_out if state.plan else {}


def removals(
    state: JobState,
    pods: Sequence[PodView],
    *,
    wanted: frozenset[str],
    fleet: ClusterNodes,
    seen: Mapping[str, float],
    template: str,
    generation: str,
    now: float,
) -> tuple[tuple[Removal, ...], float | None]:
    """Return the Pods to delete now, and the seconds until that must be asked again.

    Args:
        state: the engine's.
        pods: the job's own.
        wanted: nodes that should have an agent.
        fleet: all nodes.
        seen: when each agent last called, seconds since the epoch.
        template: digest of what agent Pods are built from now.
        generation: of the job's spec, as Pods carry it.
        now: seconds since the epoch.
    """
    remove: list[Removal] = []
    waits: list[float] = []
    for pod in pods:
        if pod.node not in fleet.nodes:
            remove.append(Removal(pod, "the Node is gone", force=True))
        elif pod.deleting:
            continue
        elif pod.node not in wanted:
            remove.append(Removal(pod, left_out(state).get(pod.node, "not wanted any more")))
        elif not pod.running:
            left = (pod.ended or pod.created) + _pause(pod.failures) - now
            if pod.mistake and (pod.template, pod.generation) == (template, generation):
                continue  # Another would end in the same way; this one stays, for people to read and delete.
            if left <= 0:
                remove.append(Removal(pod, f"it has ended ({pod.phase}) and is replaced"))
            else:
                waits.append(left)
        elif pod.template != template:
            if _busy(state, pod.node, now):
                waits.append(ROLL_SECONDS)
            else:
                remove.append(Removal(pod, "its template changed"))
        elif pod.phase == "Running" and pod.node in state.lost and not pod.trouble:
            left = max(seen.get(pod.node, 0.0), pod.created) + HUNG_SECONDS - now
            if left <= 0:
                remove.append(Removal(pod, f"its agent has not called for {HUNG_SECONDS:.0f} s"))
            else:
                waits.append(left)
        elif pod.phase == "Pending" and pod.node not in state.lost and pod.node not in state.agents:
            waits.append(max(1.0, pod.created + STARTING_SECONDS - now))
    return tuple(remove), min(waits, default=None)


def _pause(failures: int) -> float:
    """Return the seconds before a Pod that ended is replaced; `failures` are those in a row."""
    doublings = min(max(0, failures - 1), 10)
    return min(REPLACE_SECONDS * 2**doublings, LONGEST_REPLACE_SECONDS)


def _busy(state: JobState, node: str, now: float) -> bool:
    """Whether a restart would throw away much work of the open round."""
    current = state.current
    if current is None or current.closed or node not in current.opened.participants or node not in state.live:
        return False
    return node not in current.updates and now - current.opened_at > ROLL_SECONDS
