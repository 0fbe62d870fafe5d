# SPDX-License-Identifier: Apache-2.0
"""Which nodes a job may use, and why it may not use the others: pure."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedpipe_api.job import FedPipeJobSpec

from ..engine.state import JobState
from .taints import GPU_TOLERATION, tolerations_of, untolerated
from .views import CapacityView, NodeView, PodView

STUCK_SECONDS = 60.0
"""How long a Pod may be kept from starting before its node makes room for another."""

_OFFERED, _FREE, _STUCK = range(3)
"""Who comes first."""

OTHER_LABELS = "labels do not match spec.nodes.selector"


@dataclass(frozen=True)
class ClusterNodes:
    """All nodes by name, and which GPU nodes other jobs hold (node to namespace/name of the job)."""

    nodes: Mapping[str, NodeView]
    capacities: Mapping[str, CapacityView]
    held: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class NodeSelection:
    """The nodes offered to a job and why others are not."""

    nodes: tuple[str, ...]
    excluded: Mapping[str, str]
    """Of the nodes that the selector matches."""
    reasons: Mapping[str, int]
    """How many nodes each reason leaves out, whether the selector matches them or not."""

    def explain(self) -> str:
        """Return one sentence on who is left out, the commonest reason first."""
        total = len(self.nodes) + sum(self.reasons.values())
        if not total:
            return "the cluster has no FedPipeNode; is the probe running?"
        text = f"{len(self.nodes)} of {total} nodes can be used"
        ranked = sorted(self.reasons.items(), key=lambda item: (-item[1], item[0]))
        parts = []
        for reason, count in ranked:
            named = [node for node, why in sorted(self.excluded.items()) if why == reason]
            who = f" ({', '.join(named[:3])}{', …' if len(named) > 3 else ''})" if named else ""
            parts.append(f"{count}: {reason}{who}")
        return f"{text}; {'; '.join(parts)}"[:900] if parts else text


def choose(
    spec: FedPipeJobSpec, state: JobState | None, pods: Mapping[str, PodView], fleet: ClusterNodes, now: float
) -> NodeSelection:
    """Return the nodes that the job may use, at most spec.nodes.max of them.

    A node at work keeps its place: a silent probe, a cordon or a Node that is briefly not ready costs nobody
    an agent that still trains. One whose Pod cannot start, for want of room for example, keeps it only while
    no other node is free. Free places go to nodes with a GPU and much memory first. Nodes that the plan left
    out do not count against the maximum.
    """
    offered = frozenset(state.offered) if state else frozenset()
    left_out = state.plan.left_out if state and state.plan else {}
    tolerations = tolerations_of(spec.pod_template)
    usable: list[tuple[int, bool, bool, int, str]] = []
    excluded: dict[str, str] = {}
    reasons: Counter[str] = Counter()
    for name, capacity in fleet.capacities.items():
        node = fleet.nodes.get(name)
        if node is not None and not spec.nodes.selector.matches(node.labels):
            reasons[OTHER_LABELS] += 1
            continue
        settled = name in offered and _settled(name, state, pods)
        why = _unusable(node, capacity, settled, fleet.held.get(name), now) or (
            None if settled or node is None else _keeps_away(node, capacity, tolerations)
        )
        if why is not None:
            excluded[name] = why
            reasons[why] += 1
        else:
            rank = _STUCK if _stuck(pods.get(name), now) else _OFFERED if name in offered else _FREE
            usable.append((rank, not settled, not capacity.devices, -capacity.memory, name))
    usable.sort()
    chosen: list[str] = []
    places = spec.nodes.max
    for *_, name in usable:
        if name in left_out:
            chosen.append(name)
        elif places:
            places -= 1
            chosen.append(name)
        else:
            reasons[f"spec.nodes.max is {spec.nodes.max}"] += 1
    return NodeSelection(tuple(sorted(chosen)), excluded, reasons)


def _stuck(pod: PodView | None, now: float) -> bool:
    """Whether the node's Pod has been there for long and something keeps it from starting."""
    if pod is None or pod.trouble is None or pod.phase != "Pending":
        return False
    return now - pod.created > STUCK_SECONDS


def _settled(name: str, state: JobState | None, pods: Mapping[str, PodView]) -> bool:
    """Whether the node's agent lives or is on its way."""
    if state is not None and name in state.live:
        return True
    pod = pods.get(name)
    lost = state is not None and name in state.lost
    return pod is not None and pod.running and not pod.trouble and not lost


def _keeps_away(node: NodeView, capacity: CapacityView, tolerations: list[Mapping[str, str]]) -> str | None:
    ours = [GPU_TOLERATION] if node.accelerator is not None and capacity.devices else []
    taint = untolerated(node.taints, [*tolerations, *ours])
    if taint is None:
        return None
    return f"the Node has the taint {taint.key}:{taint.effect}, which spec.podTemplate does not tolerate"


def _unusable(
    node: NodeView | None, capacity: CapacityView, settled: bool, holder: str | None, now: float
) -> str | None:
    """Return why the node cannot be used. Texts hold no times: they are recorded when they change."""
    if node is None:
        return "the Node is gone"
    if capacity.unschedulable:
        return "spec.unschedulable of its FedPipeNode is true"
    if settled:
        return None
    if node.cordoned:
        return "the Node is cordoned"
    if not node.ready:
        return "the Node is not ready"
    if capacity.fault:
        return capacity.fault
    if capacity.stale(now):
        return "its probe has gone silent"
    return None if holder is None else f"its GPU is used by job {holder}"
