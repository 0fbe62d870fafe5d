"""From a job's state to its next plan: what the planner is asked, and what of its answer is recorded."""

from collections.abc import Mapping
from dataclasses import replace

from fedpipe_api.wire import NodePlan, ProfileReport

from ..planner import Calibration, NodeFacts, PlanRequest, calibrate, plan
from .records import PlanMade
from .state import JobState, Round
from .worker import Worker


class Infeasible(Exception):
    """Too few nodes fit the job; the message says why."""


async def make_plan(worker: Worker, state: JobState, reason: str) -> PlanMade:
    """Return the record of the next plan.

    Raises Infeasible when fewer nodes fit than spec.nodes.min, UserError when the spec cannot be planned.
    """
    request = request_of(state)
    made = await worker.run(plan, request)
    if len(made.nodes) < state.spec.nodes.min:
        why = "; ".join(f"{node}: {text}" for node, text in sorted(made.left_out.items())[:3])
        raise Infeasible(f"{len(made.nodes)} nodes fit, spec.nodes.min is {state.spec.nodes.min}. {why}")
    return PlanMade(
        version=state.plan.version + 1 if state.plan else 1,
        reason=reason,
        nodes=made.nodes,
        left_out=made.left_out,
        selected=made.selected,
        scores=dict(request.importance or {}),
        considered=tuple(facts.name for facts in request.nodes),
    )


def request_of(state: JobState) -> PlanRequest:
    """Return what is known of the live nodes; it rests on the ledger alone."""
    assert state.model is not None
    bare = PlanRequest(
        model=state.model,
        spec=state.spec,
        nodes=tuple(_facts(state, node) for node in state.live),
        importance=importance(state),
        selected=state.plan.selected if state.plan and state.plan.scores else (),
    )
    calibrated = (replace(facts, calibration=_calibration(state, bare, facts.name)) for facts in bare.nodes)
    return replace(bare, nodes=tuple(calibrated))


def importance(state: JobState) -> Mapping[str, float] | None:
    """Return each matrix's score, averaged over the nodes by samples (METHOD §1); None before profiling."""
    if state.spec.adapter.selection.mode != "importance" or not state.profiles:
        return None
    total: dict[str, float] = {}
    samples = 0
    for node, profiled in sorted(state.profiles.items()):
        weight = state.agents[node].samples
        samples += weight
        for name, score in profiled.report.scores.items():
            total[name] = total.get(name, 0.0) + weight * score
    return {name: score / samples for name, score in sorted(total.items())}


def _facts(state: JobState, node: str) -> NodeFacts:
    agent = state.agents[node]
    return NodeFacts(
        name=node,
        device=agent.device,
        samples=agent.samples,
        evaluation_samples=agent.evaluation_samples,
        previous=state.plan.nodes.get(node) if state.plan else None,
    )


def _calibration(state: JobState, request: PlanRequest, node: str) -> Calibration | None:
    """Return what the node's latest measurement says: its update, its silence in a round, or its profile."""
    for number in sorted(state.rounds, reverse=True):
        known = state.rounds[number]
        plan = state.plans[known.opened.plan].nodes.get(node)
        report = _report(known, node, plan) if plan else None
        if plan and report:
            return calibrate(request, node, plan, report, remainder=number > 1)
    profiled, first = state.profiles.get(node), state.plans.get(1)
    if profiled is None or first is None or node not in first.nodes:
        return None
    return calibrate(request, node, first.nodes[node], profiled.report, remainder=False)


def _report(known: Round, node: str, plan: NodePlan) -> ProfileReport | None:
    manifest = known.updates.get(node)
    if manifest is not None and manifest.step_seconds > 0:
        return ProfileReport(
            step_seconds=manifest.step_seconds,
            peak_bytes=manifest.peak_bytes,
            micro_batch=manifest.micro_batch,
        )
    if known.closed is None or known.closed_at is None or node not in known.closed.stragglers:
        return None
    # It missed the deadline: the whole round went into the steps that it was last heard of at.
    steps = max(1, known.closed.stragglers[node])
    return ProfileReport(
        step_seconds=(known.closed_at - known.opened_at) / steps,
        peak_bytes=plan.predicted_bytes,
        micro_batch=plan.micro_batch,
    )
