# SPDX-License-Identifier: Apache-2.0
"""From a job's state to its next plan: what the planner is asked, and what of its answer is recorded."""

import asyncio
from collections.abc import Mapping
from dataclasses import replace

from fedpipe_api import units
from fedpipe_api.accounting import Steps, divergences
from fedpipe_api.wire import NodePlan, ProfileReport

from ..planner import Calibration, NodeFacts, PlanRequest, calibrate, plan, steps_of, with_noise
from .privacy import BudgetSpent, spent
from .records import PlanMade
from .shapes import difference
from .state import JobState, Round
from .weights import capped
from .worker import Worker

REASON = 1024
"""Characters that a record keeps of a reason."""


class PlanInfeasible(Exception):
    """Too few nodes fit the job; the message says why."""


def _compute_divergences(steps: list[Steps]) -> None:
    for each in steps:
        divergences(each.noise_multiplier, each.sampling_rate)


async def make_plan(worker: Worker, state: JobState, reason: str, *, unmeasured: bool = False) -> PlanMade:
    """Return the record of the next plan.

    Raises PlanInfeasible when fewer nodes fit than spec.nodes.min, BudgetSpent when as few have privacy
    budget left, UserError when the spec cannot be planned.
    """
    # What is registered while the planner works is for the next plan.
    request, shape, considered, odd = request_of(state), state.shape, state.live, _other_models(state)
    made = await worker.run(state.namespace, plan, request)
    nodes, no_budget = made.nodes, dict[str, str]()
    if state.spec.privacy:
        samples = {facts.name: facts.samples for facts in request.nodes}
        before = {node: spent(state, node) for node in made.nodes}
        rounds = state.spec.rounds.count - state.done
        nodes, no_budget = await worker.run(
            state.namespace, with_noise, made.nodes, state.spec.privacy, samples, before, rounds
        )
        # In a thread, so that the event loop finds them known when it counts what is spent.
        await asyncio.to_thread(
            _compute_divergences, [steps_of(each, samples[node]) for node, each in nodes.items()]
        )
    left_out = odd | {node: why[:REASON] for node, why in no_budget.items()}
    left_out |= {node: (why + killed(state, node))[:REASON] for node, why in made.left_out.items()}
    if no_budget and len(nodes) < state.spec.nodes.min:
        node = min(no_budget)
        raise BudgetSpent(f"{len(no_budget)} nodes cannot go on; {node}: {no_budget[node]}")
    if len(nodes) < state.spec.nodes.min:
        why = "; ".join(f"{node}: {text}" for node, text in sorted(left_out.items())[:3])
        raise PlanInfeasible(f"{len(nodes)} nodes fit, spec.nodes.min is {state.spec.nodes.min}. {why}")
    return PlanMade(
        version=state.plan.version + 1 if state.plan else 1,
        reason=reason,
        shape=shape,
        nodes=nodes,
        left_out=dict(sorted(left_out.items())),
        selected=made.selected,
        scores=dict(request.importance or {}),
        considered=considered,
        unmeasured=unmeasured,
    )


def killed(state: JobState, node: str) -> str:
    """Return how the node's agent was killed, as the end of a reason; empty if it was not."""
    size = state.killed.get(node)
    return "" if size is None else f"; its agent was killed for memory at {units.memory(size)}"


def request_of(state: JobState) -> PlanRequest:
    """Return what is known of the live nodes that have the job's model; it depends on the ledger alone."""
    assert state.model is not None
    bare = PlanRequest(
        model=state.model,
        spec=state.spec,
        nodes=tuple(_facts(state, node) for node, shape in state.shapes.items() if shape == state.shape),
        importance=importance(state),
        selected=state.plan.selected if state.plan and state.plan.scores else (),
    )
    calibrated = (replace(facts, calibration=_calibration(state, bare, facts.name)) for facts in bare.nodes)
    return replace(bare, nodes=tuple(calibrated))


def importance(state: JobState) -> Mapping[str, float] | None:
    """Return each matrix's score, averaged over the nodes by samples (METHOD §1); None before profiling.

    Neither by the samples nor by the scores that it reports does a node count for more than its capped share.
    """
    if state.spec.adapter.selection.mode != "importance" or not state.profiles:
        return None
    if state.plan and state.plan.scores and not state.profiles.keys() <= state.agents.keys():
        # The job was suspended; of agents that have not registered again the samples are unknown.
        return state.plan.scores
    reports = {n: p.report for n, p in sorted(state.profiles.items()) if n in state.agents}
    if not reports:
        return None
    weights = capped({node: state.agents[node].samples for node in reports})
    sums = {node: sum(report.scores.values()) for node, report in reports.items()}
    shares = capped(sums)
    total: dict[str, float] = {}
    for node, report in reports.items():
        factor = weights[node] * (shares[node] / sums[node] if sums[node] else 1.0)
        for name, score in report.scores.items():
            total[name] = total.get(name, 0.0) + factor * score
    samples = sum(weights.values())
    return {name: score / samples for name, score in sorted(total.items())}


def _other_models(state: JobState) -> dict[str, str]:
    """Return why each live node with another model than the job's is left out."""
    odd = {node: state.models.get(shape) for node, shape in state.shapes.items() if shape != state.shape}
    if not odd:
        return {}
    assert state.model is not None
    fields = {node: difference(model, state.model) if model else "shape" for node, model in odd.items()}
    text = "its model has another {} than the job's, which most nodes have; correct spec.model on it"
    return {node: text.format(field) for node, field in fields.items()}


def _facts(state: JobState, node: str) -> NodeFacts:
    agent = state.agents[node]
    return NodeFacts(
        name=node,
        device=agent.device,
        samples=agent.samples,
        evaluation_samples=agent.evaluation_samples,
        previous=state.plan.nodes.get(node) if state.plan else None,
        limit=state.memory_limit(node),
    )


def _calibration(state: JobState, request: PlanRequest, node: str) -> Calibration | None:
    """Return what the node's latest measurement says: its update, its silence in a round, or its profile."""
    for number in reversed(state.rounds):
        known = state.rounds[number]
        plan = state.plans[known.opened.plan].nodes.get(node)
        # An agent that was killed did not take the whole round for its steps.
        report = _report(known, node, plan) if plan and not state.outgrew(node, plan) else None
        if plan and report:
            return calibrate(request, node, plan, report, remainder=number > 1)
    profiled, first = state.profiles.get(node), state.plans.get(state.profiled_by.get(node, 1))
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
    # A clock that was set forward meanwhile shows more than the round could take.
    seconds = min(known.closed_at, known.deadline) - known.opened_at
    if seconds <= 0:
        return None  # it was set back, and says nothing of the node
    # It missed the deadline: the whole round went into the steps that it was last heard of at.
    steps = max(1, known.closed.stragglers[node])
    return ProfileReport(
        step_seconds=seconds / steps,
        peak_bytes=plan.predicted_bytes,
        micro_batch=plan.micro_batch,
    )
