# SPDX-License-Identifier: Apache-2.0
"""One look of `reconcile` at a job: fleets and states to look at."""

from typing import Any

from fedpipe_api.wire import NodePlan, Precision
from fedpipe_operator.engine.records import AgentRegistered, Offered, PlanMade, Submitted
from fedpipe_operator.engine.state import JobState, apply, submitted
from fedpipe_operator.kube.node_selection import ClusterNodes
from fedpipe_operator.kube.reconcile import Actions, reconcile
from fedpipe_operator.kube.views import capacity_view, node_view, pod_view
from kube.objects import NOW, UID, capacity, node
from standins.agents import model_shape, registration

SHAPE = model_shape(2)
PLAN = NodePlan(
    precision=Precision.FP32, micro_batch=4, accumulation=1, ranks={m.name: 2 for m in SHAPE.matrices},
    local_steps=2, predicted_bytes=1, predicted_step_seconds=1, predicted_round_seconds=2, limited_by="ranks",
)  # fmt: skip


def fleet(
    *names: str, held: dict[str, str] | None = None, bodies: Any = (), reports: Any = ()
) -> ClusterNodes:
    """A fleet of CPU nodes, with some bodies given."""
    nodes = {name: node_view(node(name)) for name in names}
    nodes |= {view.name: view for view in map(node_view, bodies)}
    capacities = {name: capacity_view(capacity(name)) for name in nodes}
    capacities |= {view.name: view for view in map(capacity_view, reports)}
    return ClusterNodes(nodes, capacities, held or {})


def state_of(
    the_job: Any,
    offered: tuple[str, ...] = (),
    live: tuple[str, ...] = (),
    *,
    plan: tuple[str, ...] | None = None,
    left_out: tuple[str, ...] = (),
    at: float = NOW - 100,
) -> JobState:
    """A job's state with agents registered and, if asked, planned and in round 1."""
    record = Submitted(namespace="support", name=the_job.metadata.name, generation=1, spec=the_job.spec)
    state = submitted(UID, record, at)
    if offered:
        apply(state, Offered(sequence=1, nodes=offered), at)
    for name in live:
        message = registration(SHAPE)
        apply(
            state,
            AgentRegistered(
                sequence=2, node=name, device=message.device, samples=10, evaluation_samples=1, model=SHAPE
            ),
            at,
        )
    if plan is not None:
        for version in (1, 2):
            made = PlanMade(
                version=version, reason="", nodes=dict.fromkeys(plan, PLAN),
                left_out=dict.fromkeys(left_out, "needs 2 GiB"), selected=(), considered=(*plan, *left_out),
            )  # fmt: skip
            apply(state, made, at)
    return state


def look(the_job: Any, the_fleet: ClusterNodes, pods: Any, state: JobState | None, **more: Any) -> Actions:
    views = [view for body in pods if (view := pod_view(body))]
    options = {"seen": {}, "template": "t1", "now": NOW} | more
    return reconcile(the_job, the_fleet, views, state, **options)
