# SPDX-License-Identifier: Apache-2.0
"""What an agent's container requests: a start before there is a plan, then what the plan needs.

Requests alone follow the plan. A memory limit would be what the agent measures as its room, so that no later
plan could need more; a limit of the podTemplate is one that plans keep to.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedpipe_api.base import parse_quantity
from fedpipe_api.job import FedPipeJob
from fedpipe_api.wire import DeviceFacts, NodePlan

from ..engine.state import JobState
from .fields import FieldReader, Unreadable
from .views import PodView, agent_container

Requests = Mapping[str, str]

UNPLANNED: Requests = {"cpu": "500m", "memory": "1Gi"}
"""Before a plan is made, and of an agent that trains on a GPU: the plan counts the GPU's memory."""

MARGIN = 1.15
"""Planned memory is within 15 % of what training takes (tests/bench/memory_model.py)."""

_MIB = 2**20


@dataclass(frozen=True)
class Resize:
    """A Pod whose agent should request other resources from now on."""

    pod: PodView
    requests: Requests


@dataclass(frozen=True)
class Kept:
    """Requests that the API server refused to give a Pod, which keeps those it has, and why."""

    wanted: Requests
    why: str

    def __str__(self) -> str:
        wanted = ", ".join(f"{name} {size}" for name, size in sorted(self.wanted.items()))
        return f"keeps its requests, as it cannot be resized to {wanted}: {self.why}"


def planned(plan: NodePlan, device: DeviceFacts) -> Requests:
    """Return what a planned agent requests: its memory with a margin, and on a CPU half of its threads.

    It uses all threads when nobody else does; requesting all would leave system Pods without room.
    """
    if device.kind != "cpu":
        return {}
    halves = max(1, device.threads)
    cpu = f"{halves // 2}" if halves % 2 == 0 else f"{500 * halves}m"
    return {"cpu": cpu, "memory": f"{math.ceil(MARGIN * plan.predicted_bytes / _MIB)}Mi"}


def resizes(job: FedPipeJob, state: JobState, pods: Sequence[PodView]) -> tuple[Resize, ...]:
    """Return the running Pods that request something else than their plan needs.

    A resource that the podTemplate speaks of is left to it.
    """
    if state.plan is None:
        return ()
    try:
        given = _given(job.spec.pod_template or {})
    except Unreadable:
        return ()  # edited meanwhile; `build_agent_pod` names the field
    found = []
    for pod in pods:
        plan, agent = state.plan.nodes.get(pod.node), state.agents.get(pod.node)
        if plan is None or agent is None or pod.phase != "Running" or pod.deleting:
            continue
        wanted = {name: size for name, size in planned(plan, agent.device).items() if name not in given}
        if wanted and any(_differs(name, pod.requests.get(name), size) for name, size in wanted.items()):
            found.append(Resize(pod, wanted))
    return tuple(found)


def _differs(name: str, has: str | None, wanted: str) -> bool:
    if has is None:
        return False  # null in the podTemplate took it away
    if name == "cpu":
        return has != wanted
    try:
        # The API server writes 1024Mi as 1Gi.
        return parse_quantity(has) != parse_quantity(wanted)
    except ValueError:
        return True


def _given(template: Mapping[str, Any]) -> set[str]:
    """Return the resources that a podTemplate gives the agent's container; Unreadable if it fits no Pod."""
    resources = agent_container(FieldReader(template).object("spec")).object("resources")
    kinds = [resources.object(kind) for kind in ("requests", "limits")]
    return {name for name in UNPLANNED if any(name in kind for kind in kinds)}
