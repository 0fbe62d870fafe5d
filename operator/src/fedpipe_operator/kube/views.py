# SPDX-License-Identifier: Apache-2.0
"""What reconcile reads of Node, FedPipeNode and Pod: small frozen views of the objects."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fedpipe_api.base import USER_MISTAKE
from fedpipe_api.names import COMPONENT_LABEL, GROUP, NODE_LABEL, child_name
from fedpipe_api.node import READY, STALE_SECONDS

from .fields import FieldReader, one_line
from .taints import Taint, taints_of

Body = Mapping[str, Any]

TEMPLATE_ANNOTATION = "fedpipe.io/template"
"""On agent Pods: digest of what they were built from, so that a changed template is noticed."""

GENERATION_ANNOTATION = "fedpipe.io/generation"
"""On agent Pods: the generation of the job that they were built for."""

AGENT, WRITER, TRACKER = "agent", "output", "tracking"
"""Components: the Pod that trains on a node, the one that writes the adapter to spec.output, and the one that
sends rounds to spec.tracking."""

_OWN_NAMES = {WRITER: "", TRACKER: ".tracking"}
"""Of the Pods that stand for no node: what their names have in its place. No node can have such a name."""

GPU = "nvidia.com/gpu"
MIG = "nvidia.com/mig-"

OUT_OF_MEMORY = "OOMKilled"
"""The kubelet's reason for a container that used more memory than it may."""

_ENDED = ("Succeeded", "Failed")

# Waiting reasons that end only when somebody fixes something.
_STUCK = {
    "ErrImagePull": "its image cannot be pulled",
    "ImagePullBackOff": "its image cannot be pulled",
    "ErrImageNeverPull": "its image is not on the node",
    "InvalidImageName": "its image has an invalid name",
    "CreateContainerConfigError": "its container cannot be configured",
    "CreateContainerError": "its container cannot be created",
    "RunContainerError": "its container cannot be started",
    "CrashLoopBackOff": "its container keeps failing",
}


@dataclass(frozen=True)
class NodeView:
    """One Node."""

    name: str
    labels: Mapping[str, str]
    ready: bool
    cordoned: bool
    taints: tuple[Taint, ...]
    accelerator: str | None
    """Resource name of a whole GPU or of the largest MIG instance it offers."""


@dataclass(frozen=True)
class CapacityView:
    """One FedPipeNode."""

    name: str
    unschedulable: bool
    fault: str | None
    """Why it cannot be used: what its probe says, or that it cannot be read."""
    devices: int
    memory: int
    """Bytes of the largest device that reports them; of the machine where there is no device."""
    link_rate: int | None
    """Bytes per second from the coordinator, as measured or declared."""
    observed_at: float
    """When its probe made the report, in seconds since the epoch."""

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
    owner: str
    """Name of that FedPipeJob."""
    node: str
    """The node it is for: the one it is bound to, before that the one it was made for."""
    bound: str
    """The node it is bound to; empty before."""
    template: str
    generation: str
    """Of the job that it was built for."""
    phase: str
    """Ended too where its agent has, although a sidecar still runs."""
    created: float
    until: float | None = None
    """When a Pod that is being deleted has to be gone."""
    component: str = AGENT
    """What it is of the job: an agent, or WRITER or TRACKER, which stand for no node."""
    trouble: str | None = None
    """Why its agent does not run, as a clause about the Pod."""
    restarted: str | None = None
    """Why its agent, which runs, had to be started again."""
    unresized: str | None = None
    """Why it does not request what its plan needs, as a clause about the Pod."""
    killed: bool = False
    """Whether its agent, which does not run, was killed because it used more memory than it may."""
    mistake: bool = False
    """Whether its agent ended because of a mistake that a person has to put right."""
    failures: int = 0
    """How many Pods of its node failed in a row, this one included."""
    ended: float | None = None
    requests: Mapping[str, str] = field(default_factory=dict)
    """Resources that the agent's container requests."""

    @property
    def deleting(self) -> bool:
        """Whether it has been asked to end."""
        return self.until is not None

    @property
    def running(self) -> bool:
        """Whether a process may be at work in it."""
        return self.phase in ("Pending", "Running", "Unknown")


def node_view(body: Body) -> NodeView:
    """Return the view of a Node; Unreadable names a field that is not as Kubernetes has it."""
    top = FieldReader(body)
    meta, spec, status = top.object("metadata"), top.object("spec"), top.object("status")
    conditions = status.objects("conditions")
    offered = sorted(
        name
        for name, count in status.texts("allocatable").items()
        if (name == GPU or name.startswith(MIG)) and count != "0"
    )
    # A whole GPU before an instance; of instances the largest, whose name has the most gigabytes.
    offered.sort(key=lambda name: (name != GPU, -_gigabytes(name)))
    return NodeView(
        name=meta.name("name"),
        labels=meta.texts("labels"),
        ready=any(c.text("type") == "Ready" and c.text("status") == "True" for c in conditions),
        cordoned=spec.flag("unschedulable"),
        taints=taints_of(spec),
        accelerator=offered[0] if offered else None,
    )


def _gigabytes(resource: str) -> int:
    digits = "".join(c for c in resource.rpartition(".")[2] if c in "0123456789")
    return int(digits[:9] or 0)


def capacity_view(body: Body) -> CapacityView:
    """Return the view of a FedPipeNode; one without status has never been looked at.

    Unreadable names a field that is not as Kubernetes has it: its probe's token may be in anybody's hands.
    """
    top = FieldReader(body)
    status = top.object("status")
    ready = next((c for c in status.objects("conditions") if c.text("type") == READY), None)
    fault = "its probe has not reported yet"
    if ready is not None:
        why = one_line(f"{ready.text('reason')}: {ready.text('message') or 'not ready'}")
        fault = "" if ready.text("status") == "True" else why
    devices = status.objects("devices")
    # A device that does not report its memory has none to plan with: the machine's is not its own.
    sizes = [device.count("totalMemory") for device in devices] or [status.object("cpu").count("totalMemory")]
    return CapacityView(
        name=top.object("metadata").name("name"),
        unschedulable=top.object("spec").flag("unschedulable"),
        fault=fault or None,
        devices=len(devices),
        memory=max(sizes),
        link_rate=status.count("linkRate") or None,
        observed_at=status.time("observedAt") or 0.0,
    )


def own_pod_name(job: str, component: str) -> str:
    """Return the name of a job's WRITER or TRACKER."""
    return child_name(job, _OWN_NAMES[component])


def pod_view(body: Body) -> PodView | None:
    """Return the view of an agent Pod; None for a Pod that no FedPipeJob controls.

    Unreadable names a field that is not as Kubernetes has it, or not as the operator wrote it.
    """
    top = FieldReader(body)
    meta, status = top.object("metadata"), top.object("status")
    owner = next((o for o in meta.objects("ownerReferences") if o.flag("controller")), None)
    annotations = meta.texts("annotations")
    if owner is None or owner.text("kind") != "FedPipeJob" or NODE_LABEL not in annotations:
        return None
    if owner.text("apiVersion").partition("/")[0] != GROUP:
        return None
    label = meta.texts("labels").get(COMPONENT_LABEL)
    component = label if label in _OWN_NAMES else AGENT
    bound = top.object("spec").text("nodeName", longest=253)
    made_for = meta.object("annotations").text(NODE_LABEL, longest=253)
    # A sidecar of the podTemplate may fail as it likes; one that must run first may not.
    containers = [c for c in status.objects("containerStatuses") if c.text("name") in (AGENT, *_OWN_NAMES)]
    containers += status.objects("initContainerStatuses")
    phase = _phase(top.object("spec"), status, containers)
    mistake = phase == "Failed" and _exit_code(containers) == USER_MISTAKE
    trouble = _trouble(status, phase, containers)
    return PodView(
        namespace=meta.name("namespace"),
        name=meta.name("name"),
        uid=meta.name("uid"),
        job=owner.name("uid"),
        owner=owner.name("name"),
        # An annotation is anybody's to edit who may edit the Pod; where it runs is not.
        node=bound or made_for if component == AGENT else made_for,
        bound=bound,
        template=meta.object("annotations").text(TEMPLATE_ANNOTATION, longest=253),
        generation=meta.object("annotations").text(GENERATION_ANNOTATION, longest=253),
        phase=phase,
        created=meta.time("creationTimestamp") or 0.0,
        until=meta.time("deletionTimestamp"),
        component=component,
        trouble=f"{trouble}; once that is right, delete Pod {meta.name('name')}" if mistake else trouble,
        restarted=_restarted(status, containers),
        mistake=mistake,
        killed=trouble is not None and _killed(containers),
        ended=_ended(status, containers) if phase in _ENDED else None,
        requests=agent_container(top.object("spec")).object("resources").texts("requests"),
    )


def agent_container(spec: FieldReader) -> FieldReader:
    """Return the agent's container of a Pod's spec or a podTemplate's, empty if it has none."""
    agents = (container for container in spec.objects("containers") if container.text("name") == AGENT)
    return next(agents, FieldReader({}))


def _phase(spec: FieldReader, status: FieldReader, containers: Iterable[FieldReader]) -> str:
    phase = status.text("phase", longest=63) or "Pending"
    code = _exit_code(containers)
    if phase != "Running" or code is None or spec.text("restartPolicy") != "Never":
        return phase
    return "Failed" if code else "Succeeded"


def _exit_code(containers: Iterable[FieldReader]) -> int | None:
    """Return the agent's exit status, None while it has not ended."""
    agents = [container for container in containers if container.text("name") == AGENT]
    return next((ended.count("exitCode") for ended in _terminated(agents)), None)


def _killed(containers: Iterable[FieldReader]) -> bool:
    """Whether the agent's last process, where none runs, was killed for memory."""
    agents = [container for container in containers if container.text("name") == AGENT]
    ends = _terminated(agents) or [agent.object("lastState").object("terminated") for agent in agents]
    return any(end.text("reason", longest=63) == OUT_OF_MEMORY for end in ends)


def _trouble(status: FieldReader, phase: str, containers: Iterable[FieldReader]) -> str | None:
    for container in containers:
        waiting = container.object("state").object("waiting")
        reason = waiting.text("reason")
        if reason in _STUCK:
            last = _last_end(container)
            return f"{_STUCK[reason]}: {last or one_line(waiting.text('message') or reason)}"
    if phase == "Failed":
        ends = _terminated(containers)
        ended = next((end for end in ends if end.count("exitCode")), ends[0] if ends else FieldReader({}))
        detail = one_line(status.text("message")) or _end(ended) or one_line(ended.text("reason"))
        reason = one_line(status.text("reason"), 63) or "Error"
        return f"its Pod failed ({reason}): {detail or 'no reason given'}"
    for condition in status.objects("conditions"):
        if condition.text("type") == "PodScheduled" and condition.text("reason") == "Unschedulable":
            return f"its Pod cannot be scheduled: {one_line(condition.text('message'))}"
    return None


def _restarted(status: FieldReader, containers: Iterable[FieldReader]) -> str | None:
    """Return how the process before the one that runs now ended, where it ended badly."""
    if status.text("phase") != "Running":
        return None
    ends = (_last_end(container) for container in containers)
    return next((f"its container was started again: {end}" for end in ends if end), None)


def _last_end(container: FieldReader) -> str:
    """Return why a container ended before it was started again, empty if it did not or had nothing to say."""
    return _end(container.object("lastState").object("terminated"))


def _end(ended: FieldReader) -> str:
    """Return why a process ended, empty if it had nothing to say."""
    reason = ended.text("reason", longest=63)
    if reason == OUT_OF_MEMORY:
        return "it was killed because it used more memory than it may (OOMKilled)"
    said = one_line(ended.text("message")).removeprefix("fedpipe-agent: ")
    return said or ("" if reason in ("Error", "Completed") else one_line(reason))


def _terminated(containers: Iterable[FieldReader]) -> list[FieldReader]:
    states = [container.object("state") for container in containers]
    return [state.object("terminated") for state in states if "terminated" in state]


def _ended(status: FieldReader, containers: Iterable[FieldReader]) -> float:
    times = [ended.time("finishedAt") for ended in _terminated(containers)]
    times += [condition.time("lastTransitionTime") for condition in status.objects("conditions")]
    return max((at for at in times if at is not None), default=0.0)
