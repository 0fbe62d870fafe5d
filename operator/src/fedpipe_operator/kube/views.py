"""What reconcile reads of Node, FedPipeNode and Pod: small frozen views of the objects."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from fedpipe_api.names import COMPONENT_LABEL, NODE_LABEL
from fedpipe_api.node import READY, STALE_SECONDS

Body = Mapping[str, Any]

TEMPLATE_ANNOTATION = "fedpipe.io/template"
"""On agent Pods: digest of what they were built from, so that a changed template is noticed."""

AGENT, WRITER = "agent", "output"
"""Components: the Pod that trains on a node, and the one that writes the adapter to spec.output.volume."""

GPU = "nvidia.com/gpu"
MIG = "nvidia.com/mig-"

# Waiting reasons that end only when somebody mends something.
_STUCK = {
    "ErrImagePull": "its image cannot be pulled",
    "ImagePullBackOff": "its image cannot be pulled",
    "ErrImageNeverPull": "its image is not on the node",
    "InvalidImageName": "its image has an invalid name",
    "CreateContainerConfigError": "its container cannot be configured",
    "CreateContainerError": "its container cannot be created",
    "RunContainerError": "its container cannot be started",
    "CrashLoopBackOff": "its agent keeps failing",
}


@dataclass(frozen=True)
class NodeView:
    """One Node."""

    name: str
    labels: Mapping[str, str]
    ready: bool
    cordoned: bool
    accelerator: str | None
    """Resource name of a whole GPU or of the largest MIG instance it offers."""


@dataclass(frozen=True)
class CapacityView:
    """One FedPipeNode."""

    name: str
    unschedulable: bool
    fault: str | None
    """Why its probe says it is not ready."""
    devices: int
    memory: int
    """Bytes of the largest device that tells them; of the machine where there is no device."""
    link_rate: int | None
    """Bytes per second from the coordinator, as measured or declared."""
    observed_at: float

    def same_but_time(self, other: "CapacityView") -> bool:
        """Whether nothing but the heartbeat moved."""
        return replace(self, observed_at=other.observed_at) == other

    def stale(self, now: float) -> bool:
        """Whether its probe has been silent for too long."""
        return now - self.observed_at > STALE_SECONDS


@dataclass(frozen=True)
class PodView:
    """One Pod of a job. Times are seconds since the epoch."""

    namespace: str
    name: str
    uid: str
    job: str
    """uid of the FedPipeJob that owns it."""
    node: str
    template: str
    phase: str
    created: float
    deleting: bool
    writer: bool = False
    """Whether it writes the job's output to a volume; then it stands for no node."""
    trouble: str | None = None
    """Why its agent does not run, as a clause about the Pod."""
    ended: float | None = None

    @property
    def running(self) -> bool:
        """Whether a process may be at work in it."""
        return self.phase in ("Pending", "Running", "Unknown")


def node_view(body: Body) -> NodeView:
    """Return the view of a Node."""
    meta, spec, status = body["metadata"], body.get("spec", {}), body.get("status", {})
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions") or ())
    allocatable: Mapping[str, str] = status.get("allocatable") or {}
    offered = sorted(
        name for name, count in allocatable.items() if (name == GPU or name.startswith(MIG)) and count != "0"
    )
    # A whole GPU before an instance; of instances the largest, whose name has the most gigabytes.
    offered.sort(key=lambda name: (name != GPU, -_gigabytes(name)))
    return NodeView(
        name=meta["name"],
        labels=dict(meta.get("labels") or {}),
        ready=ready,
        cordoned=bool(spec.get("unschedulable")),
        accelerator=offered[0] if offered else None,
    )


def _gigabytes(resource: str) -> int:
    digits = "".join(c for c in resource.rpartition(".")[2] if c.isdigit())
    return int(digits or 0)


def capacity_view(body: Body) -> CapacityView:
    """Return the view of a FedPipeNode; one without status has never been looked at."""
    status: Mapping[str, Any] = body.get("status") or {}
    ready = next((c for c in status.get("conditions") or () if c["type"] == READY), None)
    fault = "its probe has not reported yet"
    if ready is not None:
        fault = (
            "" if ready["status"] == "True" else f"{ready['reason']}: {ready.get('message') or 'not ready'}"
        )
    devices = status.get("devices") or ()
    cpu = status.get("cpu") or {}
    # A device that does not tell its memory has none to plan with: the machine's is not its own.
    sizes = [d.get("totalMemory") or 0 for d in devices] or [cpu.get("totalMemory") or 0]
    return CapacityView(
        name=body["metadata"]["name"],
        unschedulable=bool((body.get("spec") or {}).get("unschedulable")),
        fault=fault or None,
        devices=len(devices),
        memory=max(sizes),
        link_rate=status.get("linkRate") or None,
        observed_at=_seconds(status.get("observedAt")) or 0.0,
    )


def pod_view(body: Body) -> PodView | None:
    """Return the view of an agent Pod; None for a Pod that no FedPipeJob controls."""
    meta, status = body["metadata"], body.get("status") or {}
    owner = next((o for o in meta.get("ownerReferences") or () if o.get("controller")), None)
    annotations = meta.get("annotations") or {}
    if owner is None or owner["kind"] != "FedPipeJob" or NODE_LABEL not in annotations:
        return None
    # A sidecar of the podTemplate may fail as it likes; one that must run first may not.
    containers = [c for c in status.get("containerStatuses") or () if c["name"] in (AGENT, WRITER)]
    containers += status.get("initContainerStatuses") or ()
    return PodView(
        namespace=meta["namespace"],
        name=meta["name"],
        uid=meta["uid"],
        job=owner["uid"],
        node=annotations[NODE_LABEL],
        template=annotations.get(TEMPLATE_ANNOTATION, ""),
        phase=status.get("phase") or "Pending",
        created=_seconds(meta.get("creationTimestamp")) or 0.0,
        deleting="deletionTimestamp" in meta,
        writer=(meta.get("labels") or {}).get(COMPONENT_LABEL) == WRITER,
        trouble=_trouble(status, containers),
        ended=_ended(status, containers),
    )


def _trouble(status: Body, containers: Iterable[Body]) -> str | None:
    for container in containers:
        waiting = (container.get("state") or {}).get("waiting") or {}
        told = _STUCK.get(waiting.get("reason", ""))
        if told is not None:
            last = (container.get("lastState") or {}).get("terminated") or {}
            detail = last.get("message") or waiting.get("message") or waiting["reason"]
            return f"{told}: {_last_line(detail)}"
    if status.get("phase") == "Failed":
        ended: Body = next(
            (c["state"]["terminated"] for c in containers if "terminated" in c.get("state", {})), {}
        )
        detail = status.get("message") or ended.get("message") or ended.get("reason") or "no reason given"
        return f"its Pod failed ({status.get('reason') or 'Error'}): {_last_line(detail)}"
    for condition in status.get("conditions") or ():
        if condition["type"] == "PodScheduled" and condition.get("reason") == "Unschedulable":
            return f"its Pod cannot be scheduled: {_last_line(condition.get('message') or '')}"
    return None


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][-400:] if lines else ""


def _ended(status: Body, containers: Iterable[Body]) -> float | None:
    if status.get("phase") not in ("Succeeded", "Failed"):
        return None
    times = [
        c["state"]["terminated"].get("finishedAt") for c in containers if "terminated" in c.get("state", {})
    ]
    times += [c.get("lastTransitionTime") for c in status.get("conditions") or ()]
    known = [s for s in map(_seconds, times) if s is not None]
    return max(known, default=0.0)


def _seconds(text: str | None) -> float | None:
    return None if text is None else datetime.fromisoformat(text).timestamp()
