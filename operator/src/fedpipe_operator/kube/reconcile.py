# SPDX-License-Identifier: Apache-2.0
"""What Kubernetes should have for a job: a pure function of the job, its nodes, Pods and engine state.

It says one step; performing it changes what it reads, and it is asked again until nothing is left to do.
So it does not matter what was missed, done twice, or done by an operator that died half way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedpipe_api.job import FedPipeJob

from ..engine.state import JobState
from .node_selection import ClusterNodes, NodeSelection, choose
from .pod_removal import STARTING_SECONDS, Removal, left_out, removals
from .pod_resources import Resize, resizes
from .views import PodView

LINGER_SECONDS = 30.0
"""After the end of a job its agents get this long to end by themselves, which keeps their logs readable."""

REGISTERED_SECONDS = 15.0
"""An agent may call before its Pod is seen here; only after so long a missing Pod means that it is gone."""


@dataclass(frozen=True)
class Actions:
    """What to do now. Empty when all is as it should be."""

    submit: bool = False
    lost: Mapping[str, str] = field(default_factory=dict)
    killed: frozenset[str] = frozenset()
    """Those of the lost nodes whose agent was killed for memory."""
    choice: NodeSelection | None = None
    """Who may take part; None when that is not asked now."""
    eligible: NodeSelection | None = None
    """The choice, when the engine has another one."""
    hold: frozenset[str] | None = None
    """GPU nodes that the job holds from now on; None leaves it as it is."""
    create: tuple[str, ...] = ()
    remove: tuple[Removal, ...] = ()
    resize: tuple[Resize, ...] = ()
    delete_job: bool = False
    again: float | None = None
    """Seconds until it must be looked at again even if nothing changes."""

    @property
    def settled(self) -> bool:
        """Whether nothing is left to do."""
        return not (
            self.submit
            or self.lost
            or self.eligible
            or self.create
            or self.remove
            or self.resize
            or self.delete_job
        )


def reconcile(
    job: FedPipeJob,
    fleet: ClusterNodes,
    pods: Sequence[PodView],
    state: JobState | None,
    *,
    seen: Mapping[str, float],
    template: str,
    now: float,
) -> Actions:
    """Return what is to be done for the job.

    Args:
        job: as the API server has it, with uid and generation.
        fleet: all nodes, and the GPU nodes that other jobs hold.
        pods: the job's own Pods.
        state: the engine's, None before the job was submitted.
        seen: when each agent last called, seconds since the epoch.
        template: digest of what agent Pods are built from now.
        now: seconds since the epoch.
    """
    # By generation, as the engine takes it in: a spec that reads differently within one was edited by nobody.
    if state is None or ((job.metadata.generation or 1) > state.generation and not state.finished):
        return Actions(submit=True)
    if state.finished:
        return _after(job, pods, state, now)
    if job.spec.suspend:
        gone = tuple(Removal(pod, "the job is suspended") for pod in pods if not pod.deleting)
        return Actions(remove=gone, hold=frozenset())
    by_node = {pod.node: pod for pod in pods}
    choice = choose(job.spec, state, by_node, fleet, now)
    enough = len(choice.nodes) >= job.spec.nodes.min or state.plan is not None
    gpus = frozenset(n for n in choice.nodes if fleet.capacities[n].devices and n not in left_out(state))
    lost = _losses(state, by_node, fleet, choice, now)
    offered = (state.offered, state.excluded)
    fresh = (choice.nodes, choice.excluded) != offered
    wanted = frozenset(choice.nodes) & frozenset(state.desired) if enough else frozenset()
    remove, again = removals(
        state,
        pods,
        wanted=wanted,
        fleet=fleet,
        seen=seen,
        template=template,
        generation=str(job.metadata.generation),
        now=now,
    )
    return Actions(
        lost=lost,
        killed=frozenset(name for name in lost if name in by_node and by_node[name].killed),
        choice=choice,
        eligible=choice if fresh else None,
        # A job that cannot start yet keeps no GPU from those that can.
        hold=gpus if enough else frozenset(),
        create=tuple(sorted(wanted - by_node.keys())),
        remove=remove,
        resize=resizes(job, state, [pod for pod in pods if pod.node in wanted]),
        again=again,
    )


def as_recorded(job: FedPipeJob, state: JobState) -> FedPipeJob:
    """Return the job with the spec that the engine has, for as long as it takes no newer one."""
    metadata = job.metadata.model_copy(update={"generation": state.generation})
    return job.model_copy(update={"metadata": metadata, "spec": state.spec})


def _losses(
    state: JobState, pods: Mapping[str, PodView], fleet: ClusterNodes, choice: NodeSelection, now: float
) -> dict[str, str]:
    """Return the offered nodes whose agent is certainly not at work, and why."""
    lost = {}
    for name in state.offered:
        if name in state.lost:
            continue
        pod, registered = pods.get(name), state.registered_at.get(name)
        if name not in fleet.capacities or name not in fleet.nodes:
            lost[name] = "the Node is gone"
        elif name not in choice.nodes:
            lost[name] = choice.excluded.get(name, "not chosen any more")
        elif pod is None:
            if name in state.agents and registered is not None and now - registered > REGISTERED_SECONDS:
                lost[name] = "its Pod is gone"
        elif pod.trouble:
            lost[name] = pod.trouble
        elif name not in state.agents and pod.phase == "Pending" and now - pod.created > STARTING_SECONDS:
            lost[name] = (
                f"its Pod has not started after {STARTING_SECONDS:.0f} s; see kubectl describe pod {pod.name}"
            )
    return lost


def _after(job: FedPipeJob, pods: Sequence[PodView], state: JobState, now: float) -> Actions:
    """Clean up after the end: agents leave by themselves or are ended; the job goes when its time is up."""
    passed = now - (state.finished_at or now)
    waits: list[float] = []
    remove: list[Removal] = []
    running = [pod for pod in pods if pod.running and not pod.deleting]
    if running and passed >= LINGER_SECONDS:
        remove = [Removal(pod, "the job has ended") for pod in running]
    elif running:
        waits.append(LINGER_SECONDS - passed)
    ttl, expired = job.spec.ttl_seconds_after_finished, False
    if ttl is not None:
        expired = passed >= ttl
        waits.append(ttl - passed)
    again = None if expired else min((w for w in waits if w > 0), default=None)
    return Actions(remove=tuple(remove), hold=frozenset(), delete_job=expired, again=again)
