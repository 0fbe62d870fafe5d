# SPDX-License-Identifier: Apache-2.0
"""What a job measured, round by round: the rows of `metrics.jsonl`, of reports and of experiment trackers."""

from collections.abc import Mapping
from typing import Any

from fedpipe_api.wire import NodePlan

from ..engine.evaluations import evaluation_of, perplexity
from ..engine.state import JobState, Round

RoundRow = dict[str, Any]

Times = Mapping[int, float]
"""When each round was done, in seconds since the epoch; 0 is the untrained start."""


def numbers(state: JobState) -> list[int]:
    """Return the rounds that there are rows of; 0 is the untrained start."""
    first = [0] if evaluation_of(state, 0) else []
    return first + [number for number, known in sorted(state.rounds.items()) if known.result]


def rounds(state: JobState) -> list[RoundRow]:
    """Return one object for each round, with seconds and bytes."""
    return [row(state, number) for number in numbers(state)]


def row(state: JobState, number: int) -> RoundRow:
    """Return the object of one aggregated round, or of 0, the untrained start."""
    found = {"round": number} | _evaluation(state, number)
    return found | _round(state, state.rounds[number]) if number else found


def _evaluation(state: JobState, number: int) -> RoundRow:
    found = evaluation_of(state, number)
    if found is None:
        return {"loss": None, "accuracy": None, "perplexity": None}
    return {
        "loss": found.loss,
        "accuracy": found.accuracy,
        "perplexity": found.perplexity,
        "evaluationSamples": found.samples,
        "evaluationNodes": found.nodes,
    }


def _round(state: JobState, known: Round) -> RoundRow:
    assert known.result is not None
    assert known.closed is not None
    updates = known.updates.values()
    plan = state.plans[known.opened.plan]
    taking_part = [plan.nodes[node] for node in known.opened.participants if node in plan.nodes]
    planned_steps = sum(each.local_steps for each in taking_part)
    opened_seconds = (known.closed_at or 0) - known.opened_at
    busy = max((m.download_seconds + m.evaluate_seconds + m.train_seconds for m in updates), default=0.0)
    return {
        "updates": len(updates),
        "participants": len(known.opened.participants),
        "stragglers": known.closed.stragglers,
        "seconds": (known.result_at or 0) - known.opened_at,
        "collectSeconds": opened_seconds,
        "aggregateSeconds": known.result.seconds,
        # Everything of the round that the busiest node was not at work in.
        "overheadSeconds": max(0.0, (known.result_at or 0) - known.opened_at - busy),
        "bytesUp": sum(manifest.size for manifest in updates),
        "bytesDown": known.closed.bytes_down,
        "underTraining": 1 - sum(manifest.steps for manifest in updates) / max(1, planned_steps),
        "relativeError": known.result.relative_error,
        "discardedEnergy": known.result.discarded_energy,
        "effectiveRank": known.result.effective_rank,
        "plan": known.opened.plan,
        "nodes": {node: _node(state, known, node) for node in known.opened.participants},
    }


def planned(plan: NodePlan) -> RoundRow:
    """Return what a plan gives a node."""
    ranks = list(plan.ranks.values())
    return {
        "precision": str(plan.precision),
        "microBatch": plan.micro_batch,
        "accumulation": plan.accumulation,
        "matrices": len(ranks),
        "minRank": min(ranks, default=0),
        "maxRank": max(ranks, default=0),
        "plannedSteps": plan.local_steps,
        "predictedBytes": plan.predicted_bytes,
        "predictedStepSeconds": plan.predicted_step_seconds,
    }


def _node(state: JobState, known: Round, name: str) -> RoundRow:
    plan = state.plans[known.opened.plan].nodes[name]
    manifest = known.updates.get(name)
    check = known.result.checks.get(name) if known.result else None
    evaluation = state.evaluations.get(known.opened.round, {}).get(name)
    row = planned(plan) | {"counted": manifest is not None}
    if manifest is not None:
        row |= {
            "samples": manifest.samples,
            "steps": manifest.steps,
            "tokens": manifest.tokens,
            "trainLoss": manifest.train_loss,
            "peakBytes": manifest.peak_bytes,
            "stepSeconds": manifest.step_seconds,
            "downloadSeconds": manifest.download_seconds,
            "evaluateSeconds": manifest.evaluate_seconds,
            "trainSeconds": manifest.train_seconds,
            "bytesUp": manifest.size,
        }
    if check is not None:
        row |= {"updateNorm": check.norm, "updateCosine": check.cosine, "verdict": check.verdict}
    if evaluation is not None:
        loss = evaluation.loss_sum / evaluation.tokens
        row |= {
            "loss": loss,
            "perplexity": perplexity(loss),
            "accuracy": None if evaluation.correct is None else evaluation.correct / evaluation.samples,
        }
    return row


def times(state: JobState) -> Times:
    """Return when each round was done."""
    return {number: time_of(state, number) for number in numbers(state)}


def time_of(state: JobState, number: int) -> float:
    """Return when a round that there is a row of was done."""
    if number == 0:
        return state.rounds[1].opened_at if 1 in state.rounds else state.submitted_at
    return state.rounds[number].result_at or 0.0
