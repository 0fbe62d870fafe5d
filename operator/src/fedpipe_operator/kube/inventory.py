# SPDX-License-Identifier: Apache-2.0
"""What the watches have shown: nodes, capacities, Pods, and who holds which GPU node."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from fedpipe_api.objects import ObjectMeta

from .fields import FieldReader, Unreadable
from .node_selection import ClusterNodes
from .views import AGENT, CapacityView, NodeView, PodView, capacity_view, node_view, own_pod_name, pod_view

Body = Mapping[str, Any]
View = TypeVar("View")

log = logging.getLogger(__name__)

UNSEEN = CapacityView("", unschedulable=False, fault="", devices=0, memory=0, link_rate=None, observed_at=0.0)


class Inventory:
    """Kept by kopf's handlers, read by the controller; `on_fleet` and `on_pod` hear of what matters.

    An object that cannot be read is left out, logged once, and never keeps the others from being seen.
    """

    def __init__(
        self,
        on_fleet: Callable[[], None],
        on_pod: Callable[[str], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.nodes: dict[str, NodeView] = {}
        self.capacities: dict[str, CapacityView] = {}
        self._pods: dict[tuple[str, str], dict[str, PodView]] = {}
        self._by_name: dict[tuple[str, str], PodView] = {}
        self._holders: dict[str, str] = {}
        self._unreadable: dict[str, dict[str, str]] = {"Node": {}, "FedPipeNode": {}, "Pod": {}}
        self._clock = clock
        # What a node's clock said at its latest report, and what ours did when it came.
        self._reports: dict[str, tuple[float, float]] = {}
        self._on_fleet = on_fleet
        self._on_pod = on_pod

    def unreadable(self) -> dict[str, int]:
        """Return how many objects of each kind cannot be read now."""
        return {kind: len(faults) for kind, faults in self._unreadable.items()}

    def see_node(self, body: Body) -> None:
        """Take in a Node; while it cannot be read, what was known of it holds."""
        view = self._read("Node", node_view, body)
        if view is not None and self.nodes.get(view.name) != view:
            self.nodes[view.name] = view
            self._on_fleet()

    def see_capacity(self, body: Body) -> None:
        """Take in a FedPipeNode; a mere heartbeat concerns nobody unless its node had been silent too long.

        One that cannot be read is a node that no agent is started on; one at work keeps its place.
        """
        view = self._read("FedPipeNode", capacity_view, body)
        if view is not None:
            view = replace(view, observed_at=self._came(view.name, view.observed_at))
        else:
            name = _name(body)
            if not name:
                return
            fault = f"its FedPipeNode cannot be read: {self._unreadable['FedPipeNode'][name]}"
            view = replace(self.capacities.get(name, UNSEEN), name=name, fault=fault)
        before = self.capacities.get(view.name)
        self.capacities[view.name] = view
        if before is None or not view.same_but_time(before) or before.stale(view.observed_at):
            self._on_fleet()

    def _came(self, name: str, stamp: float) -> float:
        """Return when a report came, by our clock: that of a node may be wrong by any amount.

        One that was there before us counts as made when it says, at most now.
        """
        known = self._reports.get(name)
        if known is None:
            came = min(stamp, self._clock())
        else:
            came = known[1] if known[0] == stamp else self._clock()
        self._reports[name] = stamp, came
        return came

    def see_pod(self, body: Body) -> None:
        """Take in a Pod; one that cannot be read any more is as good as gone."""
        view = self._read("Pod", pod_view, body)
        if view is None:
            known = self._by_name.get(_key(body))
            if known is not None:
                self._forget(known)
                self._on_pod(known.job)
        elif self._by_name.get((view.namespace, view.name)) != view:
            replaced = self._by_name.get((view.namespace, view.name))
            if replaced is not None and (replaced.uid, replaced.job) != (view.uid, view.job):
                self._forget(replaced)
                self._on_pod(replaced.job)
            self._by_name[view.namespace, view.name] = view
            self._pods.setdefault((view.namespace, view.job), {})[view.name] = view
            self._on_pod(view.job)

    def _read(self, kind: str, read: Callable[[Body], View], body: Body) -> View | None:
        name = "/".join(filter(None, _key(body))) if kind == "Pod" else _name(body)
        try:
            view = read(body)
        except Unreadable as error:
            if self._unreadable[kind].get(name) != str(error):
                log.warning("%s %s cannot be read and is left out: %s", kind, name, error)
            self._unreadable[kind][name] = str(error)
            return None
        self._unreadable[kind].pop(name, None)
        return view

    def lose_node(self, name: str) -> None:
        """Forget a Node."""
        self._unreadable["Node"].pop(name, None)
        if self.nodes.pop(name, None):
            self._on_fleet()

    def lose_capacity(self, name: str) -> None:
        """Forget a FedPipeNode."""
        self._unreadable["FedPipeNode"].pop(name, None)
        self._reports.pop(name, None)
        if self.capacities.pop(name, None):
            self._on_fleet()

    def lose_pod(self, namespace: str, name: str, uid: str) -> None:
        """Forget a Pod, unless another one has taken its name."""
        self._unreadable["Pod"].pop(f"{namespace}/{name}", None)
        view = self._by_name.get((namespace, name))
        if view is not None and view.uid == uid:
            self._forget(view)
            self._on_pod(view.job)

    def _forget(self, view: PodView) -> None:
        self._by_name.pop((view.namespace, view.name), None)
        mine = self._pods.get((view.namespace, view.job), {})
        mine.pop(view.name, None)
        if not mine:
            self._pods.pop((view.namespace, view.job), None)

    def pod(self, namespace: str, name: str) -> PodView | None:
        """Return a Pod by its name."""
        return self._by_name.get((namespace, name))

    def own_pod(self, job: ObjectMeta, component: str) -> PodView | None:
        """Return the job's WRITER or TRACKER; another Pod that has its name is none."""
        found = self.pod(job.namespace, own_pod_name(job.name, component))
        return found if found and (found.component, found.job) == (component, job.uid) else None

    def agents_of(self, namespace: str, uid: str) -> list[PodView]:
        """Return the agent Pods of a job."""
        return [view for view in self.pods_of(namespace, uid) if view.component == AGENT]

    def pods_of(self, namespace: str, uid: str) -> list[PodView]:
        """Return all Pods of a job; one in another namespace is none, whatever it says of its owner."""
        return list(self._pods.get((namespace, uid), {}).values())

    def pod_uids(self) -> dict[str, tuple[str, str]]:
        """Return (namespace, name) of every Pod by its uid."""
        return {view.uid: key for key, view in self._by_name.items()}

    # GPU nodes are held by one job at a time: first come, first served.

    def hold(self, uid: str, nodes: Iterable[str]) -> bool:
        """Let a job hold exactly these GPU nodes; return whether it let go of one."""
        wanted = set(nodes)
        freed = [node for node, holder in self._holders.items() if holder == uid and node not in wanted]
        for node in freed:
            del self._holders[node]
        for node in wanted:
            self._holders.setdefault(node, uid)
        return bool(freed)

    def fleet_for(self, uid: str, names: Mapping[str, str]) -> ClusterNodes:
        """Return the fleet as a job sees it; `names` gives other jobs' names by uid."""
        held = {node: names[who] for node, who in self._holders.items() if who != uid and who in names}
        return ClusterNodes(self.nodes, self.capacities, held)


def _key(body: Body) -> tuple[str, str]:
    """Return namespace and name, empty where they cannot be read."""
    try:
        meta = FieldReader(body).object("metadata")
        return meta.text("namespace", longest=63), meta.text("name", longest=253)
    except Unreadable:
        return "", ""


def _name(body: Body) -> str:
    return _key(body)[1]
